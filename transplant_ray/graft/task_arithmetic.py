"""Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089) of a pair: base + λ·((target − base) + (source − base)).

All tensors take part, embeddings and norms too, as in the paper and in mergekit: a baseline that moves what no module swap can.
Tensors that the three models do not share in name and shape stay the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from transplant_ray.models.compare import Comparison
from transplant_ray.models.header import FLOATS
from transplant_ray.models.loading import load_tensors
from transplant_ray.models.writing import MakeTensor, write_checkpoint


def write_task_arithmetic(pair: Comparison, base: Comparison, scale: float, out: Path) -> None:
    """Write the merge at λ = `scale` into the folder `out`: the target's files with other weights, made one tensor at a time.

    `base` compares the base model, as a source, with the same target.
    """
    write_checkpoint(pair.target, merged_tensors(pair, base, scale), out)


def merged_tensors(pair: Comparison, base: Comparison, scale: float) -> dict[str, MakeTensor]:
    """For every tensor of the target that all three share, by its name in the target's files, how to make it."""
    theirs, origins = counterparts(pair), counterparts(base)

    def make(name: str) -> MakeTensor:
        def made() -> torch.Tensor:
            target = load_tensors(pair.target, [name])[name]
            source = load_tensors(pair.source, [theirs[name]])[theirs[name]]
            return add_task_vectors(load_tensors(base.source, [origins[name]])[origins[name]], target, source, scale)

        return made

    return {name: make(name) for name in theirs if name in origins}


def add_task_vectors(base: torch.Tensor, target: torch.Tensor, source: torch.Tensor, scale: float) -> torch.Tensor:
    """base + scale·((target − base) + (source − base)), in float32 for narrower dtypes, in the target's dtype."""
    wide = torch.promote_types(target.dtype, torch.float32)
    start = base.to(wide, copy=True)
    moved = (target.to(wide) - start).add_(source.to(wide) - start)
    return start.add_(moved.mul_(scale)).to(target.dtype)


def counterparts(comparison: Comparison) -> Mapping[str, str]:
    """Floating-point tensors of equal shape that two models share: name in the target's files → name in the source's.

    All names of one model may have a prefix that the other's lack, as GPT-2's do on the hub.
    """
    pair = next(iter(comparison.pairs.values()))
    ours, theirs = _prefixes(pair.target.disk_weight, pair.source.disk_weight)
    shared = {}
    for name, info in comparison.target.tensors.items():
        for other in (theirs + name.removeprefix(ours), name):
            found = comparison.source.tensors.get(other)
            if found is not None and found.shape == info.shape and {found.dtype, info.dtype} <= FLOATS:
                shared[name] = other
                break
    return shared


def _prefixes(one: str, other: str) -> tuple[str, str]:
    """What stands before the longest ending that two names have in common."""
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    common = next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))
    return one[: len(one) - common], other[: len(other) - common]


def num_merged_parameters(pair: Comparison, base: Comparison) -> int:
    """Parameters that take part."""
    return sum(prod(pair.target.tensors[name].shape) for name in counterparts(pair).keys() & counterparts(base).keys())
