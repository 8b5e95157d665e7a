"""A variant is its content: equal ones have equal ids, wherever they come from; and W(c) is exact at both ends."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.errors import VariantError
from transplant_ray.graft.variant import (
    ORIGIN,
    VARIANT_SCHEMA,
    Coefficient,
    Variant,
    blend,
    check_variant,
    read_variant,
    variant_rows,
)
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role

NAMES = [f"model.layers.{layer}.mlp.{leaf}_proj" for layer in range(3) for leaf in ("up", "down")]
SHARES = st.sampled_from([0.0, 0.25, 1 / 3, 1.0]) | st.floats(0, 1)
COEFFICIENTS = st.sampled_from([0, 1]) | SHARES | st.lists(SHARES, min_size=4, max_size=4).map(tuple)
POINTS = st.dictionaries(st.sampled_from(NAMES), COEFFICIENTS)
MODULES = {name: Module(name, 0, "mlp.up_proj", Role("ffn", "up"), (4, 6), False, "F32", name, None) for name in NAMES}


@settings(max_examples=50, deadline=None)
@given(POINTS, st.randoms(use_true_random=False))
def test_order_and_explicit_zeros_do_not_change_a_variant(point: dict[str, Coefficient], rng: random.Random) -> None:
    spelled_out = list({**dict.fromkeys(NAMES, 0), **point}.items())
    rng.shuffle(spelled_out)
    variant, again = Variant(point), Variant(dict(spelled_out))
    assert variant == again
    assert variant.id == again.id
    assert hash(variant) == hash(again)


@pytest.mark.parametrize("again", [1.0, np.float64(1), True + 0.0])
def test_whole_numbers_and_floats_are_one_variant(again: float) -> None:
    assert Variant({NAMES[0]: 1}).id == Variant({NAMES[0]: again}).id
    assert Variant({NAMES[0]: (0, 1)}).id == Variant({NAMES[0]: (-0.0, again)}).id


@settings(max_examples=50, deadline=None)
@given(POINTS, POINTS)
def test_ids_are_equal_exactly_when_variants_are(one: dict[str, Coefficient], other: dict[str, Coefficient]) -> None:
    assert (Variant(one).id == Variant(other).id) == (Variant(one) == Variant(other))


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_a_variant_survives_json_and_pickle(point: dict[str, Coefficient]) -> None:
    variant = Variant(point)
    for copy in (Variant.from_json(json.loads(json.dumps(variant.to_json()))), pickle.loads(pickle.dumps(variant))):
        assert copy == variant
        assert copy.id == variant.id
        assert list(copy.coefficients) == sorted(copy.coefficients)


def test_a_variant_cannot_be_changed() -> None:
    given_dict: dict[str, Coefficient] = {NAMES[0]: 1.0}
    variant = Variant(given_dict)
    given_dict[NAMES[1]] = 1.0
    assert list(variant.coefficients) == [NAMES[0]]
    with pytest.raises(TypeError):
        variant.coefficients[NAMES[1]] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(variant)).coefficients[NAMES[1]] = 1.0


def test_the_origin_is_the_empty_variant() -> None:
    assert Variant.uniform(NAMES, 0.0) == ORIGIN
    assert Variant({NAMES[0]: -0.0}).id == ORIGIN.id
    assert Variant.uniform(NAMES).coefficients == dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("coefficient", "words"),
    [
        (1.5, r"1\.5; expected a number in \[0, 1\]"),
        (-0.1, r"-0\.1"),
        (10**400, "expected a number"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "True"),
        (False, "False"),
        (None, "None"),
        ("0.5", "'0.5'"),
        ("", "''"),
        ([1, 0, 1, 0], r"\[1, 0, 1, 0\]"),
        ((0.5, 2.0, 0.0, 0.0), r"2\.0"),
        ((0.5, float("nan"), 0.0, 0.0), "nan"),
        ((1.0, 0.0, 1.0), "3 coefficients, expected 1 or its 4 channels"),
        ((1.0,) * 6, "6 coefficients, expected 1 or its 4 channels"),
        ((), "0 coefficients"),
    ],
)
def test_a_coefficient_that_means_nothing_is_refused(coefficient: Any, words: str) -> None:
    with pytest.raises(VariantError, match=f"{NAMES[0]} has .*{words}"):
        check_variant(Variant({NAMES[0]: coefficient}), MODULES)


def test_an_unknown_module_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(VariantError, match=r"layers\.1\.mlp\.up_prj is not a compatible.*mean model\.layers\.1\.mlp\.up_proj"):
        check_variant(Variant({"model.layers.1.mlp.up_prj": 1.0}), MODULES)


@pytest.mark.parametrize("value", [[], "all", None, 3])
def test_only_a_mapping_is_read_as_a_variant(value: Any) -> None:
    with pytest.raises(VariantError, match="expected a mapping"):
        Variant.from_json(value)


def test_a_good_variant_passes_the_check_unchanged() -> None:
    variant = Variant({NAMES[0]: 1, NAMES[1]: (0, 1, 0.5, 0)})
    assert check_variant(variant, MODULES) is variant


def weights(seed: int, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    random_numbers = torch.Generator().manual_seed(seed)
    target, source = (torch.randn(shape, generator=random_numbers) for _ in range(2))
    return target.to(dtype), (source * 100).to(dtype)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), DTYPES)
def test_the_ends_are_the_tensors_themselves(seed: int, dtype: torch.dtype) -> None:
    target, source = weights(seed, dtype, 4, 6)
    assert blend(target, source, 0) is target
    assert blend(target, source, 0.0) is target
    assert blend(target, source, 1) is source
    assert blend(target, source, 1.0) is source


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), DTYPES, st.lists(st.booleans(), min_size=4, max_size=4))
def test_channels_at_the_ends_are_exact(seed: int, dtype: torch.dtype, chosen: list[bool]) -> None:
    target, source = weights(seed, dtype, 4, 6)
    mixed = blend(target, source, tuple(map(float, chosen)))
    for channel, from_source in enumerate(chosen):
        assert torch.equal(mixed[channel], (source if from_source else target)[channel])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), DTYPES, st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=4, max_size=4).map(tuple))
def test_between_the_ends_it_is_the_formula(seed: int, dtype: torch.dtype, coefficient: Coefficient) -> None:
    target, source = weights(seed, dtype, 4, 6)
    c = torch.tensor(coefficient, dtype=torch.float64).reshape(-1, 1)
    expected = target.double() + c * (source.double() - target.double())
    mixed = blend(target, source, coefficient)
    assert mixed.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(mixed.double(), expected, rtol=rounding, atol=rounding * 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=4, max_size=4).map(tuple))
def test_channels_are_columns_of_a_transposed_weight_and_entries_of_a_bias(seed: int, coefficient: Coefficient) -> None:
    target, source = weights(seed, torch.float32, 4, 4)  # square: a wrong axis would go unseen by its shape
    plain = blend(target, source, coefficient)
    assert torch.equal(blend(target.T, source.T, coefficient, transposed=True), plain.T)
    for column in range(4):
        for transposed in (False, True):  # a bias has one axis, whatever its weight's layout
            bias = blend(target[:, column], source[:, column], coefficient, transposed=transposed)
            assert torch.equal(bias, plain[:, column])


@pytest.mark.parametrize("coefficient", [1.0, 0.5, (1.0, 0.0, 0.5, 1.0)])
def test_the_targets_dtype_is_kept(coefficient: Coefficient) -> None:
    target, source = weights(0, torch.float32, 4, 6)
    assert blend(target.bfloat16(), source, coefficient).dtype == torch.bfloat16


@pytest.mark.parametrize("coefficient", [1.5, -0.5, (0.0, 1.0, 2.5, -1.0)])
def test_outside_of_the_path_only_what_is_meant(coefficient: Coefficient) -> None:
    point = {NAMES[0]: coefficient}
    with pytest.raises(VariantError, match=r"expected a number in \[0, 1\] \(or `sweep\.extrapolate: true`\)"):
        check_variant(Variant(point), MODULES)
    meant = Variant(point, extrapolate=True)
    assert check_variant(meant, MODULES) is meant
    assert check_variant(pickle.loads(pickle.dumps(meant)), MODULES).extrapolate


def test_that_it_is_meant_is_no_part_of_what_a_variant_is() -> None:
    plain, meant = Variant({NAMES[0]: 0.5}), Variant({NAMES[0]: 0.5}, extrapolate=True)
    assert plain == meant
    assert (plain.id, hash(plain), plain.to_json()) == (meant.id, hash(meant), meant.to_json())
    assert Variant.uniform(NAMES, 1.5, extrapolate=True).extrapolate
    assert not Variant.uniform(NAMES).extrapolate


@pytest.mark.parametrize("coefficient", [1e4, -1000.5, float("nan"), float("inf"), True, "1.5", (0.0, 1e3 + 1, 0.0, 0.0)])
def test_what_means_nothing_is_refused_of_an_extrapolation_too(coefficient: Any) -> None:
    with pytest.raises(VariantError, match=r"expected a number in \[-1000, 1000\]\.$"):
        check_variant(Variant({NAMES[0]: coefficient}, extrapolate=True), MODULES)


@pytest.mark.parametrize("coefficient", [1.5, -0.5])
def test_past_the_ends_a_blend_goes_on_in_a_straight_line(coefficient: float) -> None:
    target, source = weights(0, torch.float32, 4, 6)
    torch.testing.assert_close(blend(target, source, coefficient), target + coefficient * (source - target), rtol=1e-4, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=4))
def test_variants_survive_their_table(points: list[dict[str, Coefficient]]) -> None:
    variants = {variant.id: variant for variant in map(Variant, points)}
    rows = pa.Table.from_pylist(list(variant_rows(variants.values())), schema=VARIANT_SCHEMA).to_pylist()
    for id, variant in variants.items():
        read = read_variant(rows, id)
        assert read.id == id
        assert read == variant
