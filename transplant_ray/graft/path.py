"""The model at a point of coefficient space, and how the loss changes with every coefficient there.

Shapes: B rows of a batch, S positions, I and O a module's inputs and outputs.

At W(c) = Wt + diag(c)·(Ws − Wt) the derivative by the coefficient of channel o in row b is
Σ_s g_bso · (x·(Ws − Wt)ᵀ + bs − bt)_bso, with g the gradient of what the module says. W(c) and the difference are made when they
are needed and dropped again, so a pass holds one module's worth of weights beside the pair. No gradient of a weight is ever
computed.

    along_path   all coefficients are one share of the straight path c·1; a derivative for every row and channel
    at_point     any coefficients, shared by all rows; a derivative for every channel, or for the module
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from transplant_ray.graft.resident import Graft, ResidentPair
from transplant_ray.graft.routed import give_back, override
from transplant_ray.graft.variant import interpolate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Offsets = Mapping[str, torch.Tensor]
"""Module → zeros (B, O) in float32, to be added to the coefficient of every row and channel; their gradient is what is wanted."""


@contextmanager
def along_path(pair: ResidentPair, share: float, num_rows: int) -> Iterator[Offsets]:
    """The model with all coefficients at `share`, for batches of `num_rows` rows."""
    offsets = {name: _zeros(num_rows, graft) for name, graft in pair.grafts.items()}
    point = {name: torch.tensor(share, dtype=torch.float64) for name in offsets}
    with _at(pair, point, offsets), _recomputed_layers(pair):
        yield offsets


@contextmanager
def at_point(pair: ResidentPair, coefficients: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
    """The model with these coefficients, differentiable in them; modules that are not named stay the target's.

    A tensor is a number, or one number per output channel (O,). It may have any float dtype, and lie on any device.
    """
    with _at(pair, {name: coefficient.detach() for name, coefficient in coefficients.items()}, coefficients):
        yield pair.model


@contextmanager
def _at(pair: ResidentPair, point: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model at `point`; gradients flow to `wanted`."""
    pair.undo()
    try:
        for name, coefficient in point.items():
            graft = pair.grafts[name]
            override(graft.linear, _forward(wanted[name], graft, coefficient.to(graft.target.weight.device)))
        yield
    finally:
        for graft in pair.grafts.values():
            give_back(graft.linear)


@contextmanager
def _recomputed_layers(pair: ResidentPair) -> Iterator[None]:
    """Layers keep what they were given and no more, and run again on the way back.

    Every module needs what it was given, which plain passes over frozen weights do not keep: together more than a layer's weights.
    """
    names = {module.name.removesuffix(f".{module.path}") for module in pair.modules.values()}
    layers = [pair.model.get_submodule(name) for name in names]
    try:
        for layer in layers:
            override(layer, partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False))
        yield
    finally:
        for layer in layers:
            give_back(layer)


def _zeros(num_rows: int, graft: Graft) -> torch.Tensor:
    return torch.zeros(num_rows, graft.module.num_channels, device=graft.target.weight.device, requires_grad=True)


def _forward(wanted: torch.Tensor, graft: Graft, coefficient: torch.Tensor) -> Any:
    apply: Any = _AtPoint.apply
    return lambda x_BSI: apply(x_BSI, wanted, graft, coefficient)


class _AtPoint(torch.autograd.Function):
    """y = x·W(c)ᵀ + b(c). Keeps x alone, where the two products of both sides would keep two outputs."""

    @staticmethod
    def forward(ctx: Any, x_BSI: torch.Tensor, wanted: torch.Tensor, graft: Graft, coefficient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_BSI)
        ctx.graft, ctx.coefficient, ctx.like = graft, coefficient, wanted.detach()
        bias = None if graft.target.bias is None else _bias(graft, coefficient)
        return linear(x_BSI, _weight(graft, coefficient), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x_BSI,), (gradient_BSO,), graft = ctx.saved_tensors, gradients, ctx.graft
        bias = None if graft.target.bias is None else graft.source.bias - graft.target.bias
        moved_BSO = linear(x_BSI, _turned(graft, graft.source.weight - graft.target.weight), bias)
        wanted = _summed(moved_BSO.mul_(gradient_BSO), ctx.like)
        below = gradient_BSO @ _weight(graft, ctx.coefficient) if ctx.needs_input_grad[0] else None
        return below, wanted, None, None


def _weight(graft: Graft, coefficient: torch.Tensor) -> torch.Tensor:
    """W(c) as (O, I)."""
    mixed = interpolate(graft.target.weight, graft.source.weight, coefficient, transposed=graft.module.transposed)
    return _turned(graft, mixed)


def _bias(graft: Graft, coefficient: torch.Tensor) -> torch.Tensor:
    return interpolate(graft.target.bias, graft.source.bias, coefficient)  # type: ignore[arg-type]


def _turned(graft: Graft, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if graft.module.transposed else weight


def _summed(product: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Σ of (…, O) in the shape, dtype and place of `like`: (B, O), (O,) or a number."""
    if like.dim() == 2:
        return _by_row(product, like.shape[0], like.dtype)
    total = product.flatten(0, -2).sum(0, dtype=like.dtype) if like.dim() == 1 else product.sum(dtype=like.dtype)
    return total.to(like.device)


def _by_row(product: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, O), summed over positions. A module that sees positions without their rows has its sum shared among the rows."""
    if product.dim() == 3 and product.shape[0] == num_rows:
        return product.sum(1, dtype=dtype)
    return (product.flatten(0, -2).sum(0, dtype=dtype) / num_rows).expand(num_rows, -1)
