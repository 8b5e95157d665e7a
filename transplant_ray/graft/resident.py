"""The resident pair: the target model with the source's weights beside it, and variants put in and taken out by pointer.

pair = ResidentPair(model, weights)
with pair.grafted(variant):
    ...                      # the model is W(c)
# and here it is the target again, bit for bit, whatever happened inside
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from transplant_ray.errors import VariantError
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant, blend, check_variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.compare import Comparison
from transplant_ray.models.header import DTYPES
from transplant_ray.models.loading import load_model, load_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Weights:
    """Weight (and bias) of one linear map: the parameter objects themselves, so that giving one back is exact."""

    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class Graft:
    """One linear map of the target's model, with both weights that it can point to."""

    module: Module
    linear: nn.Module
    target: Weights
    source: Weights

    def point(self, coefficient: Coefficient) -> None:
        """Make the map W(coefficient). Moves pointers only for 0 and 1."""
        self.linear.weight = self._mixed(self.target.weight, self.source.weight, coefficient)
        if self.target.bias is not None and self.source.bias is not None:
            self.linear.bias = self._mixed(self.target.bias, self.source.bias, coefficient)

    def _mixed(self, target: nn.Parameter, source: nn.Parameter, coefficient: Coefficient) -> nn.Parameter:
        mixed = blend(target, source, coefficient, transposed=self.module.transposed)
        return mixed if isinstance(mixed, nn.Parameter) else _parameter(mixed)


class ResidentPair:
    """A target model whose modules can point to source weights. Changes pointers only for coefficients 0 and 1."""

    def __init__(self, model: PreTrainedModel, source: Mapping[str, Weights], modules: Mapping[str, Module]) -> None:
        """`source` holds the source's weights by module name, on the devices and in the dtype of the target's."""
        self.model = model
        self.modules = {name: modules[name] for name in source}
        self.grafts = {name: _graft(model, modules[name], weights) for name, weights in source.items()}
        self._variant = ORIGIN

    @property
    def variant(self) -> Variant:
        """What the model is now."""
        return self._variant

    def apply(self, variant: Variant) -> None:
        """Make the model `variant`, touching only modules whose coefficient changes. VariantError before anything is touched.

        A failure on the way (a blend finds no memory) leaves the target, never half a variant.
        """
        check_variant(variant, self.modules)
        now, then = self._variant.coefficients, variant.coefficients
        try:
            for name in now.keys() | then.keys():
                if now.get(name, 0) != then.get(name, 0):
                    self.grafts[name].point(then.get(name, 0))
        except BaseException:  # Ctrl-C between two modules would leave half a variant too
            self.undo()
            raise
        self._variant = variant

    def undo(self) -> None:
        """Make the model the target again, bit for bit."""
        for graft in self.grafts.values():
            graft.point(0)
        self._variant = ORIGIN

    @contextmanager
    def grafted(self, variant: Variant) -> Iterator[PreTrainedModel]:
        """The model as `variant` inside the block, as the target after it, also after an exception."""
        try:
            self.apply(variant)
            yield self.model
        finally:
            self.undo()


def load_resident_pair(
    comparison: Comparison, dtype: str, device_map: str = "cpu", names: frozenset[str] | None = None
) -> ResidentPair:
    """Load the target, and of the source only the compatible modules (or those in `names`), each beside its counterpart."""
    model = load_model(comparison.target, dtype, device_map)
    wanted = {name: pair for name, pair in comparison.pairs.items() if names is None or name in names}
    disk = [name for pair in wanted.values() for name in (pair.source.disk_weight, pair.source.disk_bias) if name]
    tensors = load_tensors(comparison.source, disk)
    source = {}
    for name, pair in wanted.items():
        device = model.get_submodule(name).weight.device
        stored = DTYPES[pair.target.dtype]  # a finer source is rounded here as an export rounds it
        bias = pair.source.disk_bias
        source[name] = Weights(
            _parameter(tensors.pop(pair.source.disk_weight).to(stored).to(device, getattr(torch, dtype))),
            _parameter(tensors.pop(bias).to(stored).to(device, getattr(torch, dtype))) if bias else None,
        )
    return ResidentPair(model, source, {name: pair.target for name, pair in wanted.items()})


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _graft(model: PreTrainedModel, module: Module, source: Weights) -> Graft:
    linear = model.get_submodule(module.name)
    target = Weights(linear.weight, linear.bias)
    _check_same_form(module.name, source, target)
    return Graft(module, linear, target, source)


def _check_same_form(name: str, source: Weights, target: Weights) -> None:
    """Setting a parameter accepts any shape, dtype and device in silence; refuse before that."""
    for what, ours, theirs in (("weight", target.weight, source.weight), ("bias", target.bias, source.bias)):
        if (ours is None) != (theirs is None):
            raise VariantError(f"{name}: only one of source and target has a {what}.")
        if ours is None or theirs is None:
            continue
        found, expected = (
            (tuple(theirs.shape), theirs.dtype, theirs.device),
            (tuple(ours.shape), ours.dtype, ours.device),
        )
        if found != expected:
            raise VariantError(f"{name}: the source's {what} is {found}, the target's is {expected}.")
