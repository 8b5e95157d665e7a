"""What a variant moves, from the files alone, is what the parameters of exported checkpoints say it moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from transplant_ray.errors import RunError, VariantError
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.norms import Norms, alpha_of_equal_norm, delta_norms, moved, read_norms, write_norms
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

DrawVariant = Callable[[Comparison, int, str], Variant]

NORMS: Norms = {
    "a": np.array([1.0, 2.0, 0.0]),
    "b": np.array([0.5, 0.25]),
    "c": np.array([0.0]),
    "d": np.array([3.0, 1e-3, 4.0, 1.0]),
}
COEFFICIENTS = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@st.composite
def points(draw: st.DrawFn) -> Variant:
    """Numbers and channel vectors over some of the modules of NORMS."""
    chosen = draw(st.lists(st.sampled_from(sorted(NORMS)), unique=True))

    def coefficient(name: str) -> Coefficient:
        size = len(NORMS[name])
        return draw(COEFFICIENTS | st.lists(COEFFICIENTS, min_size=size, max_size=size).map(tuple))

    return Variant({name: coefficient(name) for name in chosen})


def slow_norms(pair: Comparison) -> dict[str, list[float]]:
    """Both models loaded, every row of [W b] by itself."""
    source, target = (AutoModelForCausalLM.from_pretrained(side.model) for side in (pair.source, pair.target))
    norms = {}
    for name in pair.pairs:
        (ws, bs), (wt, bt) = (_rows(model.get_submodule(name)) for model in (source, target))
        norms[name] = [
            math.sqrt(sum((s - t) ** 2 for s, t in zip(ws[o] + bs[o], wt[o] + bt[o], strict=True))) for o in range(len(wt))
        ]
    return norms


def _rows(linear: torch.nn.Module) -> tuple[list[list[float]], list[list[float]]]:
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    bias = [[]] * len(weight) if linear.bias is None else linear.bias[:, None].tolist()
    return weight.tolist(), bias


def distance(folder: Path, target: str) -> float:
    """‖θ − θt‖ over all tensors of two checkpoints."""
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, Path(target)))
    return math.sqrt(sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours))


def test_norms_are_those_of_a_slow_plain_computation(comparison: Comparison) -> None:
    norms, slow = delta_norms(comparison), slow_norms(comparison)
    assert list(norms) == list(comparison.pairs)
    for name, norms_O in norms.items():
        assert norms_O.dtype == np.float64
        assert norms_O.shape == (comparison.pairs[name].target.num_channels,)
        np.testing.assert_allclose(norms_O, slow[name], rtol=1e-12)


@pytest.mark.parametrize("what", ["hard", "alpha", "channels", "mixed"])
def test_moved_is_the_share_of_the_way_that_an_exported_checkpoint_went(
    comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path, what: str
) -> None:
    variant, target = draw_variant(comparison, 3, what), comparison.target.model
    part = distance(export_checkpoint(comparison, variant, tmp_path / "part", "card"), target)
    whole = distance(export_checkpoint(comparison, Variant.uniform(comparison.pairs), tmp_path / "whole", "card"), target)
    share = moved(variant, delta_norms(comparison))
    assert share == pytest.approx(part / whole, rel=1e-5)
    assert 0.2 < share < 0.95


def test_a_finer_source_is_rounded_as_an_export_rounds_it(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", 1)
    target = save_tiny(tmp_path / "target", "llama", 2, dtype=torch.bfloat16)
    pair = compare(open_checkpoint(str(source)), open_checkpoint(str(target)))
    everything = Variant.uniform(pair.pairs)
    exported = distance(export_checkpoint(pair, everything, tmp_path / "all", "card"), str(target))
    norms = delta_norms(pair)
    assert math.sqrt(sum(float((row_O**2).sum()) for row_O in norms.values())) == pytest.approx(exported, rel=1e-12)
    unrounded = slow_norms(pair)
    assert any(not np.allclose(norms[name], unrounded[name], rtol=1e-6) for name in norms)


@settings(max_examples=100, deadline=None)
@given(points())
def test_the_uniform_alpha_of_equal_norm_moves_as_much(variant: Variant) -> None:
    alpha = alpha_of_equal_norm(variant, NORMS)
    assert 0 <= alpha <= 1 + 1e-12
    assert moved(Variant.uniform(NORMS, alpha), NORMS) == pytest.approx(moved(variant, NORMS), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(points(), st.floats(0.01, 1))
def test_moved_scales_with_the_coefficients(variant: Variant, factor: float) -> None:
    scaled = {
        name: tuple(factor * part for part in c) if isinstance(c, tuple) else factor * c for name, c in variant.coefficients.items()
    }
    assert moved(Variant(scaled), NORMS) == pytest.approx(factor * moved(variant, NORMS), rel=1e-9, abs=1e-150)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(sorted(NORMS))))
def test_squares_of_disjoint_variants_add_up(names: set[str]) -> None:
    """Whole modules and the rest of them make up everything."""
    chosen, rest = Variant.uniform(names), Variant.uniform(NORMS.keys() - names)
    assert moved(chosen, NORMS) ** 2 + moved(rest, NORMS) ** 2 == pytest.approx(1)


def test_ends() -> None:
    assert moved(ORIGIN, NORMS) == 0
    assert moved(Variant.uniform(NORMS), NORMS) == 1
    assert moved(Variant.uniform(["c"]), {"c": np.zeros(2)}) == 0


def test_strangers_are_refused() -> None:
    with pytest.raises(VariantError, match="e is not among the 4 modules"):
        moved(Variant({"e": 1.0}), NORMS)
    with pytest.raises(VariantError, match="a has 2 coefficients, expected 1 or its 3"):
        moved(Variant({"a": (1.0, 0.0)}), NORMS)


def test_the_table_gives_back_what_was_kept(comparison: Comparison, tmp_path: Path) -> None:
    norms = delta_norms(comparison)
    write_norms(tmp_path / "modules.parquet", norms, comparison.modules)
    again = read_norms(tmp_path / "modules.parquet")
    assert list(again) == list(norms)
    for name, norms_O in norms.items():
        np.testing.assert_array_equal(again[name], norms_O)
    with pytest.raises(RunError, match="not a readable Parquet"):
        read_norms(tmp_path / "nothing.parquet")
