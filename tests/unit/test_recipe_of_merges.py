"""What a recipe may say of merging baselines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from transplant_ray.errors import RecipeError
from transplant_ray.graft.merges import MASK_SEED, planned_merges
from transplant_ray.recipe import MERGES, Recipe, load_recipe, parse_recipe


def recipe(base: str | None = "b", **controls: Any) -> Recipe:
    task = {"data": "d.jsonl", "prompt": "{a}", "answer": "{b}", "max_new_tokens": 4}
    models = {"source": {"model": "s"}, "target": {"model": "t"}} | ({"base": {"model": base}} if base else {})
    return parse_recipe({"name": "r", **models, "task": task, "sweep": {"k": [4], "controls": controls}})


@pytest.mark.parametrize(
    ("base", "controls", "message"),
    [
        (None, {"merges": ["task_arithmetic"]}, r"merges` .'task_arithmetic'. need a `base`"),
        ("b", {}, "`base` has no effect without `sweep.controls.merges`"),
        ("b", {"merges": ["slerp"]}, "unknown merge 'slerp'"),
        ("b", {"merges": ["ties", "ties"]}, "has a value twice"),
        ("b", {"merges": ["ties"], "scales": []}, "at least one value is needed"),
        ("b", {"merges": ["ties"], "scales": [0]}, "greater than 0"),
        ("b", {"merges": ["ties"], "density": 0}, "greater than 0"),
        ("b", {"merges": ["ties"], "density": 1.1}, "less than or equal to 1"),
        ("b", {"merges": ["task_arithmetic"], "density": 0.2}, "`density` has no effect: .'task_arithmetic'. has none of"),
        (None, {"scales": [0.7]}, "`scales` has no effect without `merges`"),
    ],
)
def test_what_cannot_be_is_refused(base: str | None, controls: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(base, **controls)


def test_what_was_resolved_reads_as_the_same_recipe(tmp_path: Path) -> None:
    """Defaults are written out, and must not be taken for settings without effect."""
    for said in (recipe(merges=["dare_ties"], density=0.2), recipe(merges=["task_arithmetic"]), recipe(None)):
        (tmp_path / "recipe.yaml").write_text(said.to_yaml())
        assert load_recipe(tmp_path / "recipe.yaml").sweep == said.sweep


def test_a_base_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe("./base", merges=["ties"]).to_yaml())
    base = load_recipe(os.path.relpath(tmp_path / "recipe.yaml")).base
    assert base is not None
    assert base.model == str(tmp_path / "base")


def test_every_merge_has_a_place_of_its_own() -> None:
    planned = planned_merges(recipe(merges=list(MERGES), scales=[0.25, 1.0]).sweep.controls)
    assert [(entry.ranker, entry.alpha) for entry in planned] == [(merge, scale) for merge in MERGES for scale in (0.25, 1.0)]
    assert {entry.ranker for entry in planned if entry.seed == MASK_SEED} == {"dare_ties", "dare_linear"}
    assert len({entry.id for entry in planned}) == len(planned) == len({entry.label for entry in planned})
    assert {(entry.role, entry.kind) for entry in planned} == {("control", "all")}
