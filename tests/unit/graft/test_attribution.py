"""Gradients with respect to coefficients: through the routed forward they are what the weights' gradients say.

    dL/dc of a module = ⟨dL/dW, Ws − Wt⟩ + ⟨dL/db, bs − bt⟩ at W(c); of a channel, its row of that sum

Shapes: B rows, S positions, A answer tokens, O and I a module's outputs and inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from tiny import VOCABULARY
from torch import nn
from torch.nn.functional import cross_entropy

from transplant_ray.graft.resident import Graft, ResidentPair, load_resident_pair
from transplant_ray.graft.routed import routed_by
from transplant_ray.graft.variant import Variant, blend
from transplant_ray.models.compare import Comparison

ANSWER = 3
SHARES = (0.0, 0.3, 1.0)
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(comparison: Comparison) -> ResidentPair:
    return load_resident_pair(comparison, "float64")


@pytest.fixture(scope="module")
def ids_BS() -> torch.Tensor:
    rng = random.Random(5)
    return torch.tensor([[rng.randrange(3, VOCABULARY) for _ in range(9)] for _ in range(3)])


def losses_B(model: nn.Module, ids_BS: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row's last tokens."""
    logits_BAV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits[:, -ANSWER:]
    return cross_entropy(logits_BAV.transpose(1, 2), ids_BS[:, -ANSWER:], reduction="none").mean(-1)


def by_channel(graft: Graft, weight: nn.Parameter, bias: nn.Parameter | None) -> torch.Tensor:
    """(O,) from the gradients of W(c) and b(c)."""
    assert weight.grad is not None
    moved = weight.grad * (graft.source.weight - graft.target.weight)
    total_O = moved.sum(0 if graft.module.transposed else 1)
    if bias is not None and graft.source.bias is not None:
        assert bias.grad is not None
        total_O = total_O + bias.grad * (graft.source.bias - graft.target.bias)
    return total_O


def through_weights(pair: ResidentPair, share: float, ids_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Module → (O,), with leaves of their own in place of all weights."""
    leaves = {}
    try:
        for name, graft in pair.grafts.items():
            ours, theirs = graft.target, graft.source
            graft.linear.weight = nn.Parameter(blend(ours.weight, theirs.weight, share).clone())
            if ours.bias is not None and theirs.bias is not None:
                graft.linear.bias = nn.Parameter(blend(ours.bias, theirs.bias, share).clone())
            leaves[name] = (graft.linear.weight, graft.linear.bias)
        losses_B(pair.model, ids_BS).mean().backward()
    finally:
        pair.undo()
    return {name: by_channel(pair.grafts[name], weight, bias) for name, (weight, bias) in leaves.items()}


def through_coefficients(
    pair: ResidentPair, ids_BS: torch.Tensor, make: Callable[[int], torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    coefficients = {name: make(module.num_channels).double().requires_grad_() for name, module in pair.modules.items()}
    with routed_by(pair, coefficients) as model:
        reduce(losses_B(model, ids_BS)).backward()
    return {name: coefficient.grad for name, coefficient in coefficients.items() if coefficient.grad is not None}


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Up to single precision, in which `transformers` computes norms and rotations whatever the dtype."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("share", SHARES)
def test_a_number_per_module(pair: ResidentPair, ids_BS: torch.Tensor, share: float) -> None:
    found = through_coefficients(pair, ids_BS, lambda _: torch.tensor(share), torch.mean)
    assert_same(found, {name: total_O.sum() for name, total_O in through_weights(pair, share, ids_BS).items()})


@pytest.mark.parametrize("share", SHARES)
def test_a_number_per_channel(pair: ResidentPair, ids_BS: torch.Tensor, share: float) -> None:
    found = through_coefficients(pair, ids_BS, lambda channels: torch.full((channels,), share), torch.mean)
    assert_same(found, through_weights(pair, share, ids_BS))


@pytest.mark.parametrize("share", SHARES)
def test_a_number_per_row_has_the_gradient_of_the_rows_own_loss(pair: ResidentPair, ids_BS: torch.Tensor, share: float) -> None:
    size = len(ids_BS)
    alone = [through_weights(pair, share, row_S[None]) for row_S in ids_BS]
    by_row = through_coefficients(pair, ids_BS, lambda _: torch.full((size, 1), share), torch.sum)
    assert_same(by_row, {name: torch.stack([row[name].sum() for row in alone])[:, None] for name in pair.modules})
    both = through_coefficients(pair, ids_BS, lambda channels: torch.full((size, channels), share), torch.sum)
    assert_same(both, {name: torch.stack([row[name] for row in alone]) for name in pair.modules})


def test_rows_may_stand_at_different_places_of_the_path(pair: ResidentPair, ids_BS: torch.Tensor) -> None:
    places = torch.tensor(SHARES)[:, None]
    found = through_coefficients(pair, ids_BS, lambda _: places.clone(), torch.sum)
    alone = [through_weights(pair, share, row_S[None]) for share, row_S in zip(SHARES, ids_BS, strict=True)]
    assert_same(found, {name: torch.stack([row[name].sum() for row in alone])[:, None] for name in pair.modules})


def test_a_few_modules_leave_the_others_at_the_target(pair: ResidentPair, ids_BS: torch.Tensor) -> None:
    names = random.Random(1).sample(list(pair.modules), 3)
    with torch.no_grad(), routed_by(pair, {name: torch.tensor(0.3).double() for name in names}) as model:
        found = losses_B(model, ids_BS)
        assert sum("forward" in module.__dict__ for module in model.modules()) == len(names)
    with torch.no_grad(), pair.grafted(Variant.uniform(names, 0.3)) as model:
        torch.testing.assert_close(found, losses_B(model, ids_BS))


def state(pair: ResidentPair) -> list[tuple[int, bool, bool]]:
    return [(id(parameter), parameter.requires_grad, parameter.grad is None) for parameter in pair.model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_get_no_gradient_and_forwards_are_restored(pair: ResidentPair, ids_BS: torch.Tensor, fails: bool) -> None:
    before, copies = state(pair), {name: value.clone() for name, value in pair.model.state_dict().items()}

    def use(ids_BS: torch.Tensor) -> None:
        coefficients = {name: torch.tensor(0.5).double().requires_grad_() for name in pair.modules}
        with routed_by(pair, coefficients) as model:
            losses_B(model, ids_BS).mean().backward()
            if fails:
                raise ZeroDivisionError

    pair.apply(Variant.uniform(pair.modules))
    if fails:
        with pytest.raises(ZeroDivisionError):
            use(ids_BS)
    else:
        use(ids_BS)
    assert state(pair) == before
    assert all(graft.source.weight.grad is None for graft in pair.grafts.values())
    assert all(torch.equal(value, copies[name]) for name, value in pair.model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in pair.model.modules())


def test_an_unknown_module_or_a_wrong_shape_leaves_nothing_behind(pair: ResidentPair, ids_BS: torch.Tensor) -> None:
    name = next(iter(pair.modules))
    with pytest.raises(KeyError), routed_by(pair, {name: torch.tensor(0.5), "no.such.module": torch.tensor(0.5)}):
        pass
    with pytest.raises(RuntimeError), routed_by(pair, {name: torch.full((5,), 0.5).double()}) as model:
        losses_B(model, ids_BS)
    assert not any("forward" in module.__dict__ for module in pair.model.modules())
