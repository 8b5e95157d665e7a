"""Recipes of organ sweeps: from YAML, with overrides, with paths, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import load_organ_recipe, make_organ_recipe, parse_organ_recipe

PLAIN: dict[str, Any] = {
    "name": "here", "recipient": {"model": "org/model"}, "organs": {"a": "organ"}, "domain": {"data": "sums.jsonl"},
    "general": {"data": ["words.txt", "hub:org/text?split=test"]},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}))
    return path


def test_inputs_are_relative_to_the_recipe_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_organ_recipe(write(tmp_path), ["organs.b=other", "sweep.positions=[0, 2]", "context=64"])
    assert recipe.recipient.model == "org/model"
    assert recipe.organs == {"a": str(tmp_path / "organ"), "b": str(tmp_path / "elsewhere" / "other")}
    assert recipe.domain.data == (str(tmp_path / "sums.jsonl"),)
    assert recipe.general.data[0] == str(tmp_path / "words.txt")
    assert recipe.general.data[1].path == "org/text"  # type: ignore[union-attr]
    assert (recipe.sweep.positions, recipe.context, recipe.storage) == ((0, 2), 64, "runs")


def test_flags_make_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert make_organ_recipe({**PLAIN, "organs": {"a": "organ"}}, []) == load_organ_recipe(path)


def test_what_cannot_change_a_result_is_no_part_of_the_identity() -> None:
    plain = parse_organ_recipe(PLAIN)
    same = parse_organ_recipe({**PLAIN, "storage": "elsewhere", "resources": {"gpus_per_model": 1}, "tracking": {"uri": "x"}})
    other = parse_organ_recipe({**PLAIN, "context": 99})
    assert plain.identity() == same.identity() != other.identity()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"organ": {}}, "`organ` is not a key of a recipe. Did you mean `organs`"),
        ({"organs": {}}, "`organs` is {}"),
        ({"organs": {"a": "x", "b": "x"}}, "has a value twice"),
        ({"organs": {"a b": "x"}}, "organs.a b"),
        ({"sweep": {"modes": ["insert", "swap"]}}, "sweep.modes"),
        ({"sweep": {"modes": []}}, "at least one value is needed"),
        ({"sweep": {"positions": [1, 1]}}, "has a value twice"),
        ({"sweep": {"positions": [-1]}}, "counted from 0"),
        ({"sweep": {"position": "all"}}, "Did you mean `sweep.positions`"),
        ({"sweep": {"most_lost": -1}}, "sweep.most_lost"),
        ({"domain": {"data": "x", "share": [0.5, 0.2]}}, "two numbers from 0 to 1"),
        ({"domain": {}}, "`domain.data` is missing"),
        ({"context": 1}, "`context` is 1"),
        ({"vocabulary": "maybe"}, "`vocabulary` is 'maybe'"),
        ({"resources": {"shard_size": 3}}, "has no effect on an organ sweep"),
        ({"resources": {"labels": {"evaluator": {"a": "b"}}}}, "has no effect on an organ sweep"),
        ({"resources": {"gpus_per_model": 2}}, "on one GPU"),
        ({"tracking": {"upload": "delta"}}, "`tracking.upload: delta`"),
        ({"tasks": {"domain": {"data": "x", "prompt": "{a}", "answer": "{b}", "max_new_tokens": 2}}}, "another name"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_organ_recipe({**PLAIN, **changes})
    assert words in str(raised.value)
