"""The routed forward: coefficients in the forward pass, so that the rows of one batch belong to different variants.

Shapes: B rows of a batch, S positions, I and O a module's inputs and outputs.

    y = x·Wtᵀ + c ∘ (x·Wsᵀ − x·Wtᵀ)        c of a row is a number, or one per output channel

    with Router(pair, variants) as router:
        router.assign([0, 0, 1])           # rows 0 and 1 of the batches that follow are variants[0], row 2 is variants[1]
        pair.model(...)

Rows with c = 0 or 1 pay for one matrix product, as they would alone, and so do channels of which each is 0 or 1: their weight is
chosen channel by channel while such a variant is in flight. Only what lies in between pays for two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from transplant_ray.errors import VariantError
from transplant_ray.graft.resident import Graft, ResidentPair
from transplant_ray.graft.variant import ENDS, Coefficient, Variant, check_variant, choose_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[[torch.Tensor], torch.Tensor]
Run = tuple[int, int, int]
"""(variant, first row, end of rows)."""

MAX_SPANS = 3
"""Up to so many spans of rows are computed as slices; more are gathered, one product a side."""
MAX_CHOSEN = 2
"""Weights of a module that are chosen channel by channel and kept at a time; rows of further variants pay for both products."""


def nested_order(variants: Sequence[Variant]) -> list[int]:
    """Indices of `variants` such that neighbours differ in few modules: then the rows of nested top-K sets are slices.

    Nearest neighbour after nearest neighbour, from the target on; ties in the given order.
    """
    points = [frozenset(variant.coefficients.items()) for variant in variants]
    left, order, here = dict.fromkeys(range(len(points))), [], frozenset[tuple[str, Coefficient]]()
    while left:
        nearest = min(left, key=lambda index: len(points[index] ^ here))
        del left[nearest]
        order.append(nearest)
        here = points[nearest]
    return order


class Router:
    """Gives every row of a batch its variant. Inside the block the pair's model is routed; after it, it is the target again."""

    def __init__(self, pair: ResidentPair, variants: Sequence[Variant]) -> None:
        """VariantError where a variant does not fit the pair; nothing is touched then."""
        for variant in variants:
            check_variant(variant, pair.modules)
        self.pair = pair
        names = dict.fromkeys(name for variant in variants for name in variant.coefficients)
        self._modules = [_RoutedModule(pair.grafts[name], [v.coefficients.get(name, 0.0) for v in variants]) for name in names]

    def __enter__(self) -> Router:
        self.pair.undo()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Make the model the target again."""
        for module in self._modules:
            module.release()
            module.made.clear()

    def assign(self, rows: Sequence[int]) -> None:
        """rows[b] is the index of the variant of row b. Rows of one variant should be neighbours."""
        runs: list[Run] = []
        for variant, members in groupby(rows):
            start = runs[-1][2] if runs else 0
            runs.append((variant, start, start + sum(1 for _ in members)))
        for module in self._modules:
            module.assign(runs)


@torch.inference_mode()
def takes_rows(pair: ResidentPair, names: Collection[str]) -> bool:
    """Whether all these modules see a batch row by row, so that they can be routed. Experts and OPT's flat layers do not."""
    batch, counts = 3, []
    handles = [
        pair.grafts[name].linear.register_forward_pre_hook(lambda _module, inputs: counts.append(inputs[0].shape[0]))
        for name in names
    ]
    try:
        pair.model.base_model(input_ids=torch.zeros(batch, 2, dtype=torch.long, device=pair.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counts == [batch] * len(names)


@contextmanager
def routed_by(pair: ResidentPair, coefficients: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
    """The model with these coefficients, differentiable in them: gradients flow to them and never to a weight.

    A tensor is a number, or one number per output channel (O,), per row (B, 1), or per row and channel (B, O).
    """
    changed = [(pair.grafts[name], coefficient) for name, coefficient in coefficients.items()]
    pair.undo()
    try:
        for graft, coefficient in changed:
            override(graft.linear, _Mix(graft, coefficient.unsqueeze(-2) if coefficient.dim() == 2 else coefficient))
        yield pair.model
    finally:
        for graft, _ in changed:
            give_back(graft.linear)


class _RoutedModule:
    """One linear map: a pointer where all rows agree, a forward of its own where they do not."""

    def __init__(self, graft: Graft, coefficients: Sequence[Coefficient]) -> None:
        """`coefficients` by variant. They are told apart once: to compare thousands of channels costs more than to multiply."""
        self.graft = graft
        numbers: dict[Coefficient, int] = {}
        self.number_of = [numbers.setdefault(coefficient, len(numbers)) for coefficient in coefficients]
        self.coefficients = list(numbers)
        self.made: dict[int, _Side] = {}

    def assign(self, runs: Sequence[Run]) -> None:
        spans: list[_Span] = []
        for number, group in groupby(runs, key=lambda run: self.number_of[run[0]]):
            members = list(group)
            spans.append(_Span(members[0][1], members[-1][2], number))
        self.release()
        if len(spans) == 1 and self.coefficients[spans[0].number] in (0, 1):
            self.graft.point(self.coefficients[spans[0].number])
        elif spans:
            override(self.graft.linear, _routed(self.graft, spans, self._sides({span.number for span in spans})))

    def release(self) -> None:
        give_back(self.graft.linear)
        self.graft.point(0)

    def _sides(self, numbers: Collection[int]) -> Mapping[int, _Side]:
        """By number of coefficient. What was made for rows that are no longer in flight is dropped first."""
        self.made = {number: side for number, side in self.made.items() if number in numbers or not isinstance(side, _Chosen)}
        for number in sorted(numbers - self.made.keys()):
            room = sum(isinstance(side, _Chosen) for side in self.made.values()) < MAX_CHOSEN
            self.made[number] = _side(self.graft, self.coefficients[number], may_choose=room)
        return self.made


@dataclass(frozen=True)
class _Span:
    """Neighbouring rows with the same coefficient of a module, by its number."""

    start: int
    stop: int
    number: int


def _routed(graft: Graft, spans: Sequence[_Span], sides: Mapping[int, _Side]) -> Forward:
    """A forward for these rows, made anew whenever they change, so that a step only multiplies."""
    if len(spans) == 1:
        return sides[spans[0].number]
    num_rows = spans[-1].stop
    by_rows = _sliced(graft, spans, sides) if len(spans) <= MAX_SPANS else _gathered(graft, spans, sides)

    def forward(x_BSI: torch.Tensor) -> torch.Tensor:
        if x_BSI.shape[0] != num_rows:
            raise VariantError(
                f"{graft.module.name} is given {x_BSI.shape[0]} rows for a batch of {num_rows}: this module cannot be routed. "
                "Evaluate its variants one at a time."
            )
        return by_rows(x_BSI)

    return forward


def _sliced(graft: Graft, spans: Sequence[_Span], sides: Mapping[int, _Side]) -> Forward:
    pieces = [(slice(span.start, span.stop), sides[span.number]) for span in spans]

    def forward(x_BSI: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return torch.cat([side(x_BSI[rows]) for rows, side in pieces])
        y_BSO = x_BSI.new_empty(*x_BSI.shape[:-1], graft.module.num_channels)
        for rows, side in pieces:
            side.into(y_BSO[rows], x_BSI[rows])
        return y_BSO

    return forward


def _gathered(graft: Graft, spans: Sequence[_Span], sides: Mapping[int, _Side]) -> Forward:
    rows: dict[int, list[int]] = {}
    for span in spans:
        rows.setdefault(span.number, []).extend(range(span.start, span.stop))
    device = graft.target.weight.device
    pieces = [(torch.tensor(members, device=device), sides[number]) for number, members in rows.items()]

    def forward(x_BSI: torch.Tensor) -> torch.Tensor:
        y_BSO = x_BSI.new_empty(*x_BSI.shape[:-1], graft.module.num_channels)
        for rows_N, side in pieces:
            y_BSO.index_copy_(0, rows_N, side(x_BSI.index_select(0, rows_N)))
        return y_BSO

    return forward


def _side(graft: Graft, coefficient: Coefficient, *, may_choose: bool) -> _Side:
    transposed = graft.module.transposed
    if coefficient == 0:
        return _Product(graft.target.weight, graft.target.bias, transposed)
    if coefficient == 1:
        return _Product(graft.source.weight, graft.source.bias, transposed)
    weight = graft.target.weight
    if may_choose and isinstance(coefficient, tuple) and ENDS.issuperset(coefficient):
        return _Chosen.of(graft, torch.tensor(coefficient, dtype=torch.bool, device=weight.device))
    return _Mix(graft, torch.tensor(coefficient, dtype=weight.dtype, device=weight.device))


class _Product:
    """x·Wᵀ + b."""

    def __init__(self, weight: torch.Tensor, bias_O: torch.Tensor | None, transposed: bool) -> None:
        self.weight_OI = weight.T if transposed else weight
        self.bias_O = bias_O

    def __call__(self, x_BSI: torch.Tensor) -> torch.Tensor:
        return linear(x_BSI, self.weight_OI, self.bias_O)

    def into(self, y_BSO: torch.Tensor, x_BSI: torch.Tensor) -> None:
        """The product, written where it belongs: nothing is copied."""
        x_NI, y_NO = x_BSI.flatten(0, -2), y_BSO.flatten(0, -2)
        if self.bias_O is None:
            torch.mm(x_NI, self.weight_OI.T, out=y_NO)
        else:
            torch.addmm(self.bias_O, x_NI, self.weight_OI.T, out=y_NO)


class _Chosen(_Product):
    """The product with a weight that takes every channel from one side: bit by bit the weight that an export writes."""

    @classmethod
    def of(cls, graft: Graft, chosen_O: torch.Tensor) -> _Chosen:
        transposed, (target, source) = graft.module.transposed, (graft.target, graft.source)
        weight = choose_rows(target.weight, source.weight, chosen_O, transposed=transposed)
        both = target.bias is not None and source.bias is not None
        return cls(weight, choose_rows(target.bias, source.bias, chosen_O) if both else None, transposed)  # type: ignore[arg-type]


class _Mix:
    """Both products, and between them by coefficient: the one way that also has a gradient."""

    def __init__(self, graft: Graft, coefficient: torch.Tensor) -> None:
        both = (graft.target, graft.source)
        self.target, self.source = (_Product(weights.weight, weights.bias, graft.module.transposed) for weights in both)
        self.coefficient = coefficient

    def __call__(self, x_BSI: torch.Tensor) -> torch.Tensor:
        target_BSO = self.target(x_BSI)
        return torch.lerp(target_BSO, self.source(x_BSI), self.coefficient.to(target_BSO.dtype))

    def into(self, y_BSO: torch.Tensor, x_BSI: torch.Tensor) -> None:
        y_BSO.copy_(self(x_BSI))


_Side = _Product | _Mix
"""How the rows of one coefficient are computed."""


def override(module: nn.Module, forward: Forward) -> None:
    """Another forward for this object alone; one that somebody put there before (accelerate) is kept for later."""
    own = module.__dict__
    own.setdefault(_KEPT, own.get("forward"))
    own["forward"] = forward


def give_back(module: nn.Module) -> None:
    own = module.__dict__
    if _KEPT not in own:
        return
    kept = own.pop(_KEPT)
    if kept is None:
        del own["forward"]
    else:
        own["forward"] = kept


_KEPT = "_transplant_ray_kept_forward"
