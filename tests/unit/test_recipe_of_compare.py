"""The recipe of a comparison: what it means, and what it refuses with the key, what was found and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import CompareRecipe, load_compare_recipe

SETTINGS: dict[str, Any] = {
    "name": "c",
    "model": {"model": "./m"},
    "training": {"data": "text.jsonl", "share": [0.2, 1], "context": 16, "tokens": 1000, "batch": 4},
    "methods": {"organ": {"layers": "1-2"}, "lora": None, "full": {}, "in_place": {}},
    "domain": {"data": ["text.jsonl", "hub:a/b"], "share": [0, 0.2]},
    "general": {"data": "other/*.txt"},
}


def load(folder: Path, *overrides: str, **changes: Any) -> CompareRecipe:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return load_compare_recipe(path, overrides)


def test_paths_are_of_the_recipes_folder_and_the_hub_stays(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.training.data == (str(tmp_path / "text.jsonl"),)
    assert recipe.domain.data[0] == str(tmp_path / "text.jsonl")
    assert recipe.domain.data[1].path == "a/b"  # type: ignore[union-attr]
    assert recipe.general.data == (str(tmp_path / "other/*.txt"),)
    assert recipe.named_models["model"].model == str(tmp_path / "m")
    several = load(tmp_path, model=None, models={"a": {"model": "./x"}, "b": {"model": "some/id"}})
    assert {name: spec.model for name, spec in several.named_models.items()} == {"a": str(tmp_path / "x"), "b": "some/id"}


def test_every_method_has_as_many_trainings(tmp_path: Path) -> None:
    every = list(load(tmp_path, "tune.lr=[3e-3,1.0e-3]", "seeds=[4,5,6]").trainings())
    for method in ("organ", "lora", "full", "in_place"):
        mine = [(stage, lr, seed) for _, name, stage, lr, seed in every if name == method]
        assert mine == [("tune", 1e-3, 1000), ("tune", 3e-3, 1000), *(("confirm", None, seed) for seed in (4, 5, 6))]


def test_methods_may_be_a_list_and_settings_have_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, methods=["full", "lora"])
    assert list(recipe.methods.wanted) == ["lora", "full"]
    assert recipe.methods.lora is not None
    assert recipe.methods.lora.scale == 16
    assert load(tmp_path).methods.layers == "1-2"
    assert recipe.tracking.experiment == "organs"
    assert load(tmp_path, "tracking.uri=sqlite:///x.db").tracking.experiment == "organs"


def test_where_it_runs_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    assert load(tmp_path).identity() == load(tmp_path, "resources.cpus=4", "storage=elsewhere").identity()
    assert load(tmp_path).identity() != load(tmp_path, "seeds=[3]").identity()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["methods.ful={}"], "`methods.ful` is not a key of a recipe. Did you mean `methods.full`"),
        (["tune.sed=3"], "Did you mean `tune.seed`"),
        (["training.lr=0.1"], "`training.lr` is not a key"),
        (["training.seed=1"], "`training.seed` is not a key"),
        (["tune.lr=[]"], "at least one value is needed"),
        (["tune.lr=[1,1]"], "has a value twice"),
        (["tune.lr=[0]"], "above 0"),
        (["seeds=[]"], "at least one value is needed"),
        (["seeds=[1,1]"], "has a value twice"),
        (["seeds=[-1]"], "seeds of 0 and more"),
        (["tune.seed=2"], "`tune.seed` 2 is one of `seeds`"),
        (["methods.lora={rank: 0}"], "`methods.lora.rank` is 0"),
        (["models.a.model=x"], "either `model` or `models`"),
        (["domain.share=[0,0.3]"], "give them shares with nothing in common"),
        (["general.data=text.jsonl"], "`general` is measured on .*text.jsonl"),
        (["training.steps=4"], "`steps` and `tokens` both say how long"),
        (["storage=s3://bucket/runs"], "a folder that all nodes see"),
        (["resources.gpus=2"], "`resources.gpus` is 2"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        # an override is relative to the working directory, where nothing of this recipe is
        load(tmp_path, *(each.replace("=text.jsonl", f"={tmp_path}/text.jsonl") for each in overrides))


def test_a_comparison_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no method; expected some of organ, lora, full, in_place"):
        load(tmp_path, methods={})
    with pytest.raises(RecipeError, match="has a value twice"):
        load(tmp_path, methods=["full", "full"])
