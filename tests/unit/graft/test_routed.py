"""The router: rows of one batch have weights of their own, what agrees costs a pointer, and nothing is left behind."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from draw import BLENDED, draw_prompts, draw_variant, last_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transplant_ray.errors import VariantError
from transplant_ray.graft import routed
from transplant_ray.graft.resident import Graft, ResidentPair, load_resident_pair
from transplant_ray.graft.routed import Router, nested_order
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.compare import Comparison


@pytest.fixture(scope="module")
def llama_pair(llama: Comparison) -> ResidentPair:
    return load_resident_pair(llama, "float32")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llama_pair: ResidentPair) -> Iterator[None]:
    """Whatever a test does, the model is the target afterwards: the same parameter objects, and no forward of ours."""
    before = {name: (parameter, parameter.clone()) for name, parameter in llama_pair.model.named_parameters()}
    yield
    after = dict(llama_pair.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter and torch.equal(parameter, copy) for name, (parameter, copy) in before.items())
    assert not any("forward" in module.__dict__ for module in llama_pair.model.modules())


def down(pair: ResidentPair) -> str:
    return next(name for name in pair.modules if name.endswith("down_proj"))


# What the router leaves behind, and what it costs.


def test_after_an_error_inside_it_is_the_target_too(llama_pair: ResidentPair) -> None:
    """`nothing_is_left_behind` looks at it afterwards."""
    pack = [Variant.uniform(llama_pair.modules), Variant.uniform(llama_pair.modules, 0.5), ORIGIN]

    def fail_after(rows: Sequence[int]) -> None:
        with Router(llama_pair, pack) as router:
            router.assign(rows)
            raise ZeroDivisionError

    for rows in ([0, 1, 2], [0]):
        with pytest.raises(ZeroDivisionError):
            fail_after(rows)
        assert "forward" not in llama_pair.grafts[down(llama_pair)].linear.__dict__


def test_a_resident_variant_is_taken_out_first(llama_pair: ResidentPair) -> None:
    llama_pair.apply(Variant.uniform(llama_pair.modules))
    with Router(llama_pair, [ORIGIN]):
        assert llama_pair.variant == ORIGIN
        assert all(graft.linear.weight is graft.target.weight for graft in llama_pair.grafts.values())


def test_a_variant_that_does_not_fit_is_refused_before_anything_is_touched(llama_pair: ResidentPair) -> None:
    with pytest.raises(VariantError, match="not a compatible module"):
        Router(llama_pair, [Variant.uniform(llama_pair.modules), Variant({"model.layers.9.mlp.up_proj": 1.0})])


@pytest.mark.parametrize(("coefficient", "side"), [(1.0, "source"), (0.0, "target")])
def test_rows_that_agree_cost_a_pointer(llama_pair: ResidentPair, coefficient: float, side: str) -> None:
    name = down(llama_pair)
    graft = llama_pair.grafts[name]
    with Router(llama_pair, [Variant({name: coefficient}), Variant({name: 1.0}), Variant({name: 0.5})]) as router:
        router.assign([1, 2, 0])
        assert "forward" in graft.linear.__dict__
        router.assign([0, 0, 0])
        assert "forward" not in graft.linear.__dict__
        assert graft.linear.weight is getattr(graft, side).weight


class Products(TorchDispatchMode):
    """Rows (of three tokens) that are multiplied with either weight of a module, whoever calls for it."""

    def __init__(self, graft: Graft) -> None:
        super().__init__()
        self.counted = Counter[str]()
        weights = {"target": graft.target.weight, "source": graft.source.weight}
        self.sides = {weight.untyped_storage().data_ptr(): side for side, weight in weights.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "linear"):
            x, weight = args[-2:] if name != "linear" else args[:2]
            side = self.sides.get(weight.untyped_storage().data_ptr())
            if side:
                self.counted[side] += x.numel() // x.shape[-1] // 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("coefficients", "rows", "expected"),
    [
        ((0.0, 1.0), [0, 0, 0, 1, 1], {"target": 3, "source": 2}),
        ((0.0, 1.0), [0, 1, 0, 1, 0, 1, 0], {"target": 4, "source": 3}),  # gathered
        ((0.0, 1.0, 0.5), [0, 1, 2, 2], {"target": 3, "source": 3}),
        ((0.0, 1.0, 0.5), [0, 1, 0, 2, 1, 2], {"target": 4, "source": 4}),
        ((0.0, 1.0), [1, 1, 1], {"source": 3}),
        ((0.5,), [0, 0], {"target": 2, "source": 2}),
    ],
)
def test_only_rows_in_between_pay_for_two_products(
    llama_pair: ResidentPair, coefficients: Sequence[float], rows: list[int], expected: dict[str, int]
) -> None:
    name = down(llama_pair)
    with Router(llama_pair, [Variant({name: c}) for c in coefficients]) as router, Products(llama_pair.grafts[name]) as products:
        router.assign(rows)
        last_logits(llama_pair.model, [[4, 5, 6]] * len(rows))
    assert products.counted == expected


def some_channels(pair: ResidentPair, seed: int) -> Variant:
    rng, name = random.Random(seed), down(pair)
    return Variant({name: tuple(rng.choice((0.0, 1.0)) for _ in range(pair.modules[name].num_channels))})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([1, 1, 1], {}),
        ([0, 1, 1], {"target": 1}),
        ([0, 1, 2, 0, 1, 2], {"target": 2}),  # gathered
        ([1, 2, 3, 3], {"target": 2, "source": 2}),  # no room for a third weight
        ([0, 1, 2, 3, 1], {"target": 2, "source": 1}),
    ],
)
def test_channels_that_are_0_or_1_pay_for_one_product_while_there_is_room(
    llama_pair: ResidentPair, rows: list[int], expected: dict[str, int]
) -> None:
    pack = [ORIGIN, *(some_channels(llama_pair, seed) for seed in range(3))]
    with Router(llama_pair, pack) as router, Products(llama_pair.grafts[down(llama_pair)]) as products:
        router.assign(rows)
        last_logits(llama_pair.model, [[4, 5, 6]] * len(rows))
    assert products.counted == expected


def test_a_chosen_weight_is_made_once_and_dropped_with_its_rows(llama_pair: ResidentPair, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    plain = routed.choose_rows

    def noting(*args: Any, **kwargs: Any) -> torch.Tensor:
        weight = plain(*args, **kwargs)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(routed, "choose_rows", noting)
    with Router(llama_pair, [some_channels(llama_pair, seed) for seed in range(5)]) as router:
        for rows, most in (([0, 0, 1], 2), ([0, 1], 2), ([1, 1], 2), ([1, 2], 3), ([3, 4, 4], 5), ([3], 5)):
            router.assign(rows)
            assert len(made) == most
            assert sum(weight() is not None for weight in made) == len(set(rows))
    assert not any(weight() is not None for weight in made)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_routed_channels_have_the_numbers_of_the_resident_weight(llama_pair: ResidentPair, seed: int) -> None:
    """Bit for bit: it is the same weight in the same product."""
    variant = draw_variant(llama_pair, random.Random(seed), "rows")
    prompts = draw_prompts(random.Random(seed), 4)
    with Router(llama_pair, [variant]) as router:
        router.assign([0] * 4)
        routed_logits = last_logits(llama_pair.model, prompts)
    with llama_pair.grafted(variant) as resident:
        assert torch.equal(routed_logits, last_logits(resident, prompts))


def test_gathered_rows_have_the_numbers_of_slices(llama_pair: ResidentPair, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    pack = [ORIGIN, Variant.uniform(llama_pair.modules), *(draw_variant(llama_pair, rng, what) for what in BLENDED)]
    rows = [rng.randrange(len(pack)) for _ in range(12)]
    prompts, logits = draw_prompts(rng, len(rows)), []
    for most in (0, 100):
        monkeypatch.setattr(routed, "MAX_SPANS", most)
        with Router(llama_pair, pack) as router:
            router.assign(rows)
            logits.append(last_logits(llama_pair.model, prompts))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_another_number_of_rows_than_assigned_is_refused(llama_pair: ResidentPair) -> None:
    with Router(llama_pair, [ORIGIN, Variant.uniform(llama_pair.modules)]) as router:
        router.assign([0, 1])
        with pytest.raises(VariantError, match="is given 3 rows for a batch of 2: this module cannot be routed"):
            last_logits(llama_pair.model, [[4], [5], [6]])


# The order of a pack.


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_nested_sets_in_any_order_become_slices(llama_pair: ResidentPair, rng: random.Random, with_target: bool) -> None:
    names = rng.sample(list(llama_pair.modules), len(llama_pair.modules))
    sizes = rng.sample(range(1, len(names) + 1), 6)
    given_pack = [Variant.uniform(names[:size]) for size in sizes] + [ORIGIN] * with_target
    rng.shuffle(given_pack)
    order = nested_order(given_pack)
    assert sorted(order) == list(range(len(given_pack)))
    pack = [given_pack[place] for place in order]
    assert [len(variant.coefficients) for variant in pack] == sorted(len(variant.coefficients) for variant in pack)
    with pytest.MonkeyPatch.context() as patch, Router(llama_pair, pack) as router:
        patch.setattr(routed, "_gathered", None)
        patch.setattr(routed, "MAX_SPANS", 2)
        router.assign(sorted(rng.choices(range(len(pack)), k=9)))


def test_the_order_of_a_pack_starts_near_the_target_and_keeps_ties() -> None:
    one, other, both, far = Variant({"a": 1}), Variant({"b": 1}), Variant({"a": 1, "b": 1}), Variant({"c": 1, "d": 1, "e": 1})
    assert nested_order([far, both, one, other]) == [2, 1, 3, 0]
    assert nested_order([other, one, one]) == [0, 1, 2]
    assert nested_order([]) == []


# Forwards that somebody else has put there.


def test_a_forward_that_was_there_before_is_given_back(llama: Comparison) -> None:
    """accelerate puts one on modules that it moves between devices."""
    pair = load_resident_pair(llama, "float32")
    linear: nn.Module = pair.grafts[down(pair)].linear
    own = linear.forward
    theirs: Callable[[torch.Tensor], torch.Tensor] = lambda x: own(x) + 1  # noqa: E731
    linear.forward = theirs
    with Router(pair, [ORIGIN, Variant.uniform(pair.modules)]) as router:
        router.assign([0, 1])
        assert linear.forward is not theirs
        router.assign([1, 0])
        router.assign([1, 1])
        assert linear.forward is theirs
        assert linear.weight is pair.grafts[down(pair)].source.weight
        router.assign([1, 0])
    assert linear.forward is theirs
