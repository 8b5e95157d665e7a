"""What mergekit makes of a variant's YAML is what `export_checkpoint` writes; what it cannot say is refused."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mergers import mergekit_or_skip
from safetensors.torch import load_file
from tiny import save_tiny, tiny_pair

from transplant_ray.errors import CheckpointError, RecipeError, VariantError
from transplant_ray.graft.export import changed_tensors, export_checkpoint
from transplant_ray.graft.mergekit import (
    PLACE,
    config_yaml,
    find_mergekit,
    merge_config,
    run_mergekit,
    variant_config,
    variant_yaml,
)
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def program() -> Path:
    return mergekit_or_skip()


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def whole_modules(pair: Comparison, seed: int = 0) -> Variant:
    """Every module is left out, taken, or blended."""
    rng = random.Random(seed)
    return Variant({name: rng.choice((0.0, 1.0, rng.random())) for name in pair.pairs})


def run_config(program: Path, config: Mapping[str, object], out: Path, seed: int = 0) -> Path:
    recipe = out.with_name(f"{out.name}.yaml")
    recipe.write_text(config_yaml(dict(config)))
    return run_mergekit(program, recipe, out, seed=seed)


def merged(pair: Comparison, variant: Variant, program: Path, folder: Path) -> tuple[Tensors, Tensors]:
    """Theirs, from the text that `export` writes, and ours."""
    (folder / "variant.yaml").write_text(variant_yaml(pair, variant))
    theirs = run_mergekit(program, folder / "variant.yaml", folder / "theirs", seed=0)
    return all_tensors(theirs), all_tensors(export_checkpoint(pair, variant, folder / "ours", "card"))


def blended(pair: Comparison, variant: Variant) -> set[str]:
    return set(changed_tensors(pair, Variant({name: c for name, c in variant.coefficients.items() if c != 1})))


@pytest.mark.parametrize("comparison", [pytest.param("gemma2", marks=pytest.mark.slow), "gpt2"], indirect=True)
def test_mergekit_makes_the_tensors_of_an_export(comparison: Comparison, program: Path, tmp_path: Path) -> None:
    """Weights and biases; what is taken or left out is equal in every element, a blend to the bound of its docstring."""
    variant = whole_modules(comparison)
    theirs, ours = merged(comparison, variant, program, tmp_path)
    source, target = (all_tensors(Path(side.model)) for side in (comparison.source, comparison.target))
    blends = blended(comparison, variant)
    assert theirs.keys() == ours.keys()
    assert 0 < len(blends) < len(variant.coefficients) * 2
    for name in ours:
        if name in blends:
            assert ((ours[name] - theirs[name]).abs() <= 2**-21 * (source[name].abs() + target[name].abs())).all(), name
        else:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.slow
def test_in_a_narrow_dtype_blends_are_equal_up_to_a_unit_in_the_last_place(program: Path, tmp_path: Path) -> None:
    """A finer source, rounded by both; a `+` in the path, which mergekit would take for a LoRA; a target in several files."""
    source = save_tiny(tmp_path / "a+b" / "source", "phi3", 1)
    target = save_tiny(tmp_path / "a+b" / "target", "phi3", 2, shard="20KB", dtype=torch.bfloat16)
    pair = compare(open_checkpoint(str(source)), open_checkpoint(str(target)))
    variant = whole_modules(pair, 1)
    theirs, ours = merged(pair, variant, program, tmp_path)
    assert theirs.keys() == ours.keys()
    blends = blended(pair, variant)
    for name in ours:
        assert theirs[name].dtype == torch.bfloat16
        if name in blends:
            apart = (ours[name].float() - theirs[name].float()).abs()
            assert (apart <= 2**-7 * ours[name].float().abs()).all(), name
            assert (apart == 0).float().mean() > 0.99
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_merge_by_task_vectors_is_the_plain_formula(program: Path, tmp_path: Path) -> None:
    """With everything kept, `dare_linear` is base + λ·((a − base) + (b − base))."""
    base = open_checkpoint(str(save_tiny(tmp_path / "base", seed=3)))
    pair = tiny_pair(tmp_path)
    config = merge_config("dare_linear", base, [pair.target, pair.source], 0.3, 1.0)
    theirs = all_tensors(run_config(program, config, tmp_path / "out"))
    a, b, start = (all_tensors(Path(side.model)) for side in (pair.target, pair.source, base))
    assert theirs.keys() == start.keys()
    for name in theirs:
        torch.testing.assert_close(theirs[name], start[name] + 0.3 * ((a[name] - start[name]) + (b[name] - start[name])))


def test_ties_is_what_the_paper_says(program: Path, tmp_path: Path) -> None:
    """Trim task vectors to their largest half, elect a sign for every element, average those that agree (arXiv:2306.01708)."""
    base = open_checkpoint(str(save_tiny(tmp_path / "base", seed=3)))
    pair = tiny_pair(tmp_path)
    config = merge_config("ties", base, [pair.target, pair.source], 0.7, 0.5)
    theirs = all_tensors(run_config(program, config, tmp_path / "out"))
    a, b, start = (all_tensors(Path(side.model)) for side in (pair.target, pair.source, base))
    for name in theirs:
        vectors = torch.stack([trimmed(side[name] - start[name]) for side in (a, b)])
        elected = torch.where(vectors.sum(0) >= 0, 1.0, -1.0)
        agree = vectors.sign() == elected
        mean = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(theirs[name], start[name] + 0.7 * mean)


def trimmed(vector: torch.Tensor) -> torch.Tensor:
    """Without the smaller half of its elements."""
    return torch.where(vector.abs() > vector.abs().flatten().sort().values[vector.numel() // 2 - 1], vector, 0.0)


@pytest.mark.slow
def test_masks_repeat_with_the_seed(program: Path, tmp_path: Path) -> None:
    base = open_checkpoint(str(save_tiny(tmp_path / "base", seed=3)))
    pair = tiny_pair(tmp_path)
    config = merge_config("dare_ties", base, [pair.target, pair.source], 1.0, 0.5)
    one, again = (all_tensors(run_config(program, config, tmp_path / out, seed=7)) for out in ("one", "again"))
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.slow
def test_mergekits_last_words_are_in_the_error(program: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mergekit-yaml .*: ended with 1: .*Unimplemented merge method nonsense"):
        run_config(program, {**variant_config(tiny_pair(tmp_path), ORIGIN), "merge_method": "nonsense"}, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_every_weight_is_found_by_one_filter(comparison: Comparison) -> None:
    """mergekit takes the first filter that is a part of the name: played through for every tensor."""
    variant = whole_modules(comparison)
    coefficients = {
        disk: variant.coefficients.get(name, 0.0)
        for name, pair in comparison.pairs.items()
        for disk in (pair.target.disk_weight, pair.target.disk_bias)
    }
    target, source = (model["parameters"]["weight"] for model in variant_config(comparison, variant)["models"])
    for name in comparison.target.tensors:
        taken, kept = (next(c["value"] for c in side if c.get("filter", "") in name) for side in (source, target))
        assert (taken, kept) == (coefficients.get(name, 0.0), 1 - coefficients.get(name, 0.0))


def test_one_coefficient_per_channel_is_refused(llama: Comparison) -> None:
    module = llama.modules[0]
    with pytest.raises(VariantError, match="has a coefficient per channel, and mergekit has one weight for a tensor"):
        variant_config(llama, Variant({module.name: (1.0, *[0.0] * (module.num_channels - 1))}))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", intermediate_size=64)
    pair = compare(open_checkpoint(str(source)), open_checkpoint(str(save_tiny(tmp_path / "target"))))
    with pytest.raises(
        VariantError, match=r"down_proj\.weight is \(32, 64\), in .* it is \(32, 48\); mergekit merges every tensor"
    ):
        variant_config(pair, ORIGIN)


def test_a_model_that_is_the_base_has_no_task_vector(llama: Comparison) -> None:
    config = merge_config("ties", llama.target, [llama.target, llama.source], 1.0, 0.5)
    assert config["base_model"] == llama.target.model
    assert [model["model"] for model in config["models"]] == [llama.source.model]


def test_a_hub_checkpoint_is_named_with_its_commit(llama: Comparison) -> None:
    hub = replace(llama.source, model="org/new", revision="c0ffee", folder=None)
    models = variant_config(replace(llama, source=hub), ORIGIN)["models"]
    assert [model["model"] for model in models] == [llama.target.model, {"model": {"path": "org/new", "revision": "c0ffee"}}]


def test_where_mergekit_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "mergekit-yaml"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv(PLACE, raising=False)
    assert find_mergekit() is None
    monkeypatch.setenv("PATH", str(fake.parent))
    assert find_mergekit() == fake
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(fake.with_name("python")))
    assert find_mergekit() == fake
    monkeypatch.setenv(PLACE, str(tmp_path / "gone"))
    with pytest.raises(RecipeError, match="no such file"):
        find_mergekit()


def test_a_program_that_cannot_run_is_a_plain_error(llama: Comparison, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did not make a checkpoint"):
        run_config(tmp_path / "gone", variant_config(llama, ORIGIN), tmp_path / "out")
