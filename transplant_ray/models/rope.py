"""How far the positions of a model reach, and where a rotary embedding stops treating every row by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

RoPE = Mapping[str, Any]


def rope_boundary(config: PretrainedConfig) -> int | None:
    """Number of positions beyond which the longest row of a batch changes the numbers of all; None where rows never meet.

    `longrope` (Phi-3) takes other frequencies past its original length, `dynamic` ones that follow the longest position.
    """
    return min(_boundaries(config), default=None)


def max_positions(config: PretrainedConfig) -> int | None:
    """Positions that a model was built for, which a `dynamic` RoPE stretches by its factor; None where the config has no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    ropes = _parameter_sets(getattr(config, "rope_parameters", None) or {})
    factors = [rope["factor"] for rope in ropes if "dynamic" in rope.get("rope_type", "default")]
    return positions if positions is None else int(positions * max(factors, default=1))


@torch.inference_mode()
def forget_longest(model: PreTrainedModel) -> None:
    """A dynamic RoPE keeps the frequencies of the longest row that it has seen, until it sees a short one."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _boundaries(config: PretrainedConfig) -> Iterator[int]:
    for rope in _parameter_sets(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        elif "dynamic" in kind:
            yield config.max_position_embeddings


def _parameter_sets(rope: RoPE) -> Iterator[RoPE]:
    """One set for all layers, or one for each type of layer."""
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    yield from nested or [rope]
