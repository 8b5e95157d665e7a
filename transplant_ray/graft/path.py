"""The straight path from the target to all swapped, c·1, and how the loss changes with every coefficient at a point of it.

Shapes: B rows of a batch, S positions, I and O a module's inputs and outputs.

At W(c) = Wt + c·(Ws − Wt) the derivative by the coefficient of channel o in row b is Σ_s g_bso · (x·(Ws − Wt)ᵀ + bs − bt)_bso, with
g the gradient of what the module says. W(c) and the difference are made when they are needed and dropped again, so a pass
holds one module's worth of weights beside the pair. No gradient of a weight is ever computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from transplant_ray.graft.resident import Graft, ResidentPair
from transplant_ray.graft.routed import give_back, override
from transplant_ray.graft.variant import blend

Offsets = Mapping[str, torch.Tensor]
"""Module → zeros (B, O) in float32, to be added to the coefficient of every row and channel; their gradient is what is wanted."""


@contextmanager
def along_path(pair: ResidentPair, share: float, num_rows: int) -> Iterator[Offsets]:
    """The model with all coefficients at `share`, for batches of `num_rows` rows."""
    pair.undo()
    offsets = {}
    try:
        for name, graft in pair.grafts.items():
            offsets[name] = _zeros(num_rows, graft)
            override(graft.linear, _forward(offsets[name], graft, share))
        yield offsets
    finally:
        for graft in pair.grafts.values():
            give_back(graft.linear)


def _zeros(num_rows: int, graft: Graft) -> torch.Tensor:
    return torch.zeros(num_rows, graft.module.num_channels, device=graft.target.weight.device, requires_grad=True)


def _forward(offset_BO: torch.Tensor, graft: Graft, share: float) -> Any:
    apply: Any = _OnPath.apply
    return lambda x_BSI: apply(x_BSI, offset_BO, graft, share)


class _OnPath(torch.autograd.Function):
    """y = x·W(c)ᵀ + b(c). Keeps x alone, where the two products of both sides would keep two outputs."""

    @staticmethod
    def forward(ctx: Any, x_BSI: torch.Tensor, offset_BO: torch.Tensor, graft: Graft, share: float) -> torch.Tensor:
        ctx.save_for_backward(x_BSI)
        ctx.graft, ctx.share, ctx.num_rows, ctx.dtype = graft, share, offset_BO.shape[0], offset_BO.dtype
        bias = None if graft.target.bias is None else _bias(graft, share)
        return linear(x_BSI, _weight(graft, share), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x_BSI,), (gradient_BSO,), graft = ctx.saved_tensors, gradients, ctx.graft
        bias = None if graft.target.bias is None else graft.source.bias - graft.target.bias
        moved_BSO = linear(x_BSI, _turned(graft, graft.source.weight - graft.target.weight), bias)
        offset_BO = _by_row(moved_BSO * gradient_BSO, ctx.num_rows, ctx.dtype)
        return gradient_BSO @ _weight(graft, ctx.share), offset_BO, None, None


def _weight(graft: Graft, share: float) -> torch.Tensor:
    """W(share) as (O, I)."""
    return _turned(graft, blend(graft.target.weight, graft.source.weight, share, transposed=graft.module.transposed))


def _bias(graft: Graft, share: float) -> torch.Tensor:
    return blend(graft.target.bias, graft.source.bias, share)  # type: ignore[arg-type]


def _turned(graft: Graft, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if graft.module.transposed else weight


def _by_row(product: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, O), summed over positions. A module that sees positions without their rows has its sum shared among the rows."""
    if product.dim() == 3 and product.shape[0] == num_rows:
        return product.sum(1, dtype=dtype)
    return (product.flatten(0, -2).sum(0, dtype=dtype) / num_rows).expand(num_rows, -1)
