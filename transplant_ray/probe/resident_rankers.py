"""Rankers that need both models in one place: by gradient, in lockstep, by loss, by weights.

attribution     −∫₀¹ ∂L(c·1)/∂c_m dc along the straight path, L the mean token loss of the reference answers; midpoint rule
channel         mean |h_source − h_target| over answer tokens and channels, the same tokens fed to both    arXiv:2601.09398
layers          whole layers: a contiguous stretch that grows, layer by layer, where it lowers the loss most
leave_one_out   by how much the loss rises when the module alone is left out of the full swap
single          by how much the loss falls when the module alone is transplanted
weight_delta    ‖Ws − Wt‖ ÷ ‖Wt‖

Shapes: E examples, B of them in a batch, N answer tokens of a batch, M modules, O output channels of a module.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.decode import pass_tokens
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import length_batches
from transplant_ray.evaluate.routing import Request
from transplant_ray.evaluate.teacher_forcing import lay_out, logits_at
from transplant_ray.graft.path import along_path
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.rope import forget_longest, rope_boundary
from transplant_ray.probe.measured import Cost, Measured, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATH_ERROR = 0.05
"""Beyond this share, the scores of `attribution` do not sum to what the full swap changes, and the user is told."""
LOCKSTEP_BYTES = 2**30
"""Outputs of all modules that `channel` keeps of one model until the other has said the same."""


@dataclass(frozen=True)
class Bench:
    """A resident pair and the probe set; `source` loads the source as it is, with embeddings and norms of its own."""

    engine: Engine
    source: Callable[[], PreTrainedModel]
    examples: Sequence[Rendered]
    steps: int
    """Points on the path of `attribution`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.engine.pair.grafts)

    def losses(self, variants: Sequence[Variant]) -> list[float]:
        """Mean token loss of each; NumericsError where one is not a number."""
        found = self.engine.losses(variants, self.examples)
        losses = [found[variant.id] for variant in variants]
        broken = [variant for variant, loss in zip(variants, losses, strict=True) if loss is None]
        if broken:
            raise NumericsError(
                f"ranking: {len(broken)} of {len(variants)} variants have a loss that is not finite, the first with "
                f"{len(broken[0].coefficients)} modules. Try `resources.dtype: float32`."
            )
        return [loss for loss in losses if loss is not None]


Ranker = Callable[[Bench], Measured]


def measure(ranker: str, bench: Bench) -> Measured:
    """By name, with the seconds that it took."""
    start = time.perf_counter()
    measured = RESIDENT[ranker](bench)
    return replace(measured, cost=replace(measured.cost, seconds=time.perf_counter() - start))


def attribution(bench: Bench) -> Measured:
    """Integrated gradients in coefficient space. The scores sum to L(target) − L(all swapped), up to the error of the rule."""
    engine, names = bench.engine, bench.names
    channels = {name: torch.zeros(module.num_channels, dtype=torch.float64) for name, module in engine.pair.modules.items()}

    def work(requests: Sequence[Request], rows: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
        for batch in batches([request.example for request in requests], (engine.pair.model,), rows):
            parts = _path_gradients(engine, [requests[i].example for i in batch], bench.steps)
            for name, part_BO in parts.items():
                channels[name] -= part_BO.sum(0) / len(bench.examples)
            values_BM = -torch.stack([parts[name].sum(-1) for name in names], dim=1)
            yield from zip(batch, values_BM.numpy(), strict=True)

    sample = _sample(engine, bench.examples, names, work)
    by_channel = {name: tuple((channel_O).tolist()) for name, channel_O in channels.items()}
    before, after = bench.losses([ORIGIN, Variant.uniform(names)])
    cost = Cost(forwards=2 * bench.steps + 2, backwards=bench.steps)  # layers run again on the way back
    return Measured.of(sample, cost, by_channel, tuple(_path_notes(sum(sample.scores.values()), before - after, bench.steps)))


def _path_notes(found: float, expected: float, steps: int) -> Iterator[str]:
    error = abs(found - expected) / max(abs(expected), 1e-12)
    if error > PATH_ERROR:
        yield (
            f"attribution: its scores sum to {found:.4g}, the loss changes by {expected:.4g} ({error:.0%} off); `rank.steps: "
            f"{2 * steps}` integrates more finely, though the ranking may well be the same"
        )


def _path_gradients(engine: Engine, examples: Sequence[Rendered], steps: int) -> Mapping[str, torch.Tensor]:
    """Module → (B, O), float64: the mean over the path of each example's ∂L/∂c."""
    total: dict[str, torch.Tensor] = {}
    answers = [example.answer_ids for example in examples]
    model = engine.pair.model
    ids_BS, place_N = lay_out([example.prompt_ids for example in examples], answers, model.device)
    reference_N = torch.tensor([token for answer in answers for token in answer], device=model.device)
    share_N = torch.tensor([1 / len(answer) for answer in answers for _ in answer], device=model.device)
    for step in range(steps):
        with torch.enable_grad(), along_path(engine.pair, (step + 0.5) / steps, len(examples)) as offsets:
            loss_N = cross_entropy(logits_at(model, ids_BS, place_N), reference_N, reduction="none")
            found = torch.autograd.grad((loss_N * share_N).sum(), list(offsets.values()), allow_unused=True)
        for name, offset, gradient_BO in zip(offsets, offsets.values(), found, strict=True):
            part_BO = torch.zeros_like(offset) if gradient_BO is None else gradient_BO  # an expert that no token reached
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + part_BO.double().cpu() / steps
    return total


def channel(bench: Bench) -> Measured:
    """Both models read the same answers, batch by batch."""
    engine, names, source = bench.engine, bench.names, bench.source()
    widths = {name: module.num_channels for name, module in engine.pair.modules.items()}
    most = max(1, LOCKSTEP_BYTES // (sum(widths.values()) * source.dtype.itemsize))
    sums = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}

    def work(requests: Sequence[Request], rows: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
        longest = max(len(request.example.answer_ids) for request in requests)
        fitting = min(rows, max(1, most // longest))
        for batch in batches([request.example for request in requests], (engine.pair.model, source), fitting):
            examples = [requests[i].example for i in batch]
            lengths = [len(example.answer_ids) for example in examples]
            difference = _lockstep(engine.pair.model, source, examples, names)
            for name, difference_NO in difference.items():
                sums[name] += difference_NO.sum(0, dtype=torch.float64).cpu()
            mean_NM = torch.stack([difference[name].mean(-1).cpu() for name in names], dim=1).double()
            yield from zip(batch, (part.mean(0).numpy() for part in torch.split(mean_NM, lengths)), strict=True)

    weights = np.array([len(example.answer_ids) for example in bench.examples], dtype=np.float64)
    sample = replace(_sample(engine, bench.examples, names, work), weight_E=weights)
    by_channel = {name: tuple((sum_O / weights.sum()).tolist()) for name, sum_O in sums.items()}
    return Measured.of(sample, Cost(forwards=2), by_channel)


@torch.inference_mode()
def _lockstep(
    target: PreTrainedModel, source: PreTrainedModel, examples: Sequence[Rendered], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Module → |h_source − h_target| (N, O), float32."""
    answers = [example.answer_ids for example in examples]
    ids_BS, place_N = lay_out([example.prompt_ids for example in examples], answers, target.device)
    outputs: list[dict[str, torch.Tensor]] = []
    for model in (target, source):
        with _outputs_at(model, names, place_N) as found:
            model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
        outputs.append(found)
    ours, theirs = outputs
    return {name: (theirs.pop(name).to(ours[name].device) - ours.pop(name)).abs_().float() for name in names}


@contextmanager
def _outputs_at(model: PreTrainedModel, names: Sequence[str], place_N: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Module → its outputs (N, O) at these places, after the forward pass in the block."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output_BSO: torch.Tensor) -> None:
            found[name] = output_BSO.flatten(0, -2).index_select(0, place_N.to(output_BSO.device))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers(bench: Bench) -> Measured:
    """The stretch begins with the layer that lowers the loss most by itself and grows by the better of its two neighbours."""
    members: dict[int, list[str]] = defaultdict(list)
    for name, module in bench.engine.pair.modules.items():
        members[module.layer].append(name)
    numbers, passes = sorted(members), 0

    def best_of(stretches: Sequence[slice]) -> slice:
        nonlocal passes
        passes += len(stretches)
        swapped = [Variant.uniform(name for number in numbers[stretch] for name in members[number]) for stretch in stretches]
        losses = bench.losses(swapped)
        return stretches[losses.index(min(losses))]

    stretch = best_of([slice(place, place + 1) for place in range(len(numbers))])
    order = [stretch.start]
    while len(order) < len(numbers):
        left, right = slice(stretch.start - 1, stretch.stop), slice(stretch.start, stretch.stop + 1)
        stretch = best_of([grown for grown in (left, right) if grown.start >= 0 and grown.stop <= len(numbers)])
        order.append(stretch.start if stretch.start < min(order) else stretch.stop - 1)
    scores = {name: float(len(order) - rank) for rank, place in enumerate(order) for name in members[numbers[place]]}
    return Measured(scores, Cost(forwards=passes))


def leave_one_out(bench: Bench) -> Measured:
    everything = Variant.uniform(bench.names)
    without = [Variant.uniform(name for name in bench.names if name != left_out) for left_out in bench.names]
    whole, *losses = bench.losses([everything, *without])
    return Measured({name: loss - whole for name, loss in zip(bench.names, losses, strict=True)}, Cost(forwards=len(losses) + 1))


def single(bench: Bench) -> Measured:
    before, *losses = bench.losses([ORIGIN, *(Variant.uniform([name]) for name in bench.names)])
    return Measured({name: before - loss for name, loss in zip(bench.names, losses, strict=True)}, Cost(forwards=len(losses) + 1))


@torch.inference_mode()
def weight_delta(bench: Bench) -> Measured:
    """Biases are left out."""
    scores = {}
    for name, graft in bench.engine.pair.grafts.items():
        target, source = (weights.weight.float() for weights in (graft.target, graft.source))
        scores[name] = float((source - target).norm() / target.norm())
    return Measured(scores)


RESIDENT: Mapping[str, Ranker] = MappingProxyType(
    {
        "attribution": attribution,
        "channel": channel,
        "layers": layers,
        "leave_one_out": leave_one_out,
        "single": single,
        "weight_delta": weight_delta,
    }
)


def batches(examples: Sequence[Rendered], models: Sequence[PreTrainedModel], rows: int) -> Iterator[list[int]]:
    """Of similar length, and of no more tokens than a pass takes."""
    lengths = [len(example.prompt_ids) + len(example.answer_ids) - 1 for example in examples]
    size = max(1, min(rows, *(pass_tokens(model) // max(lengths) for model in models)))
    boundaries = [boundary for model in models if (boundary := rope_boundary(model.config)) is not None]
    for batch in length_batches(lengths, size, boundary=min(boundaries, default=None)):
        for model in models if boundaries else ():
            forget_longest(model)
        yield batch


def _sample(
    engine: Engine,
    examples: Sequence[Rendered],
    names: tuple[str, ...],
    work: Callable[[Sequence[Request], int], Iterator[tuple[int, NDArray[np.float64]]]],
) -> Sample:
    """What `work` says of every example, each counted once."""
    found: dict[str, NDArray[np.float64]] = {}
    for request, value_M in engine.until_done([Request(0, example) for example in examples], work):
        assert value_M is not None
        found[request.example.id] = value_M
    values_EM = np.stack([found[example.id] for example in examples])
    if not np.isfinite(values_EM).all():
        broken = names[int(np.flatnonzero(~np.isfinite(values_EM).all(axis=0))[0])]
        raise NumericsError(f"ranking: what {broken} scores is not finite. Try `resources.dtype: float32`.")
    return Sample(names, values_EM, np.ones(len(examples)))
