"""What a recipe may say of guards, of the objective, and of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import GENERAL_TEXT, GuardSpec, Recipe, load_recipe, parse_recipe

TASK = {"data": "d.jsonl", "prompt": "{a}", "answer": "{b}", "max_new_tokens": 4}
LOSS = {"data": "e.jsonl", "prompt": "{a}", "answer": "{b}", "scorer": "loss"}
MODELS = {"source": {"model": "s"}, "target": {"model": "t"}}


def content(guards: Any = None, rank: Any = None, **sweep: Any) -> dict[str, Any]:
    made = {"name": "r", **MODELS, "task": TASK, "rank": rank or {}, "sweep": {"k": [4], **sweep}}
    return made if guards is None else {**made, "guards": guards}


def recipe(guards: Any = None, rank: Any = None, **sweep: Any) -> Recipe:
    return parse_recipe(content(guards, rank, **sweep))


def test_general_text_is_a_guard_unless_it_is_switched_off() -> None:
    text = recipe().guards.text
    assert text is not None
    assert text.data == GENERAL_TEXT
    assert recipe({"text": None}).guards.text is None


@pytest.mark.parametrize(
    ("names", "held_out", "spared", "choosing"),
    [
        ([], None, None, ()),
        (["a"], None, "a", ()),
        (["a"], "a", "a", ()),
        (["a", "b", "c"], None, "c", ("a", "b")),
        (["a", "b", "c"], "a", "a", ("b", "c")),
    ],
)
def test_one_is_always_held_out(names: list[str], held_out: str | None, spared: str | None, choosing: tuple[str, ...]) -> None:
    guards = GuardSpec.model_validate({"tasks": dict.fromkeys(names, TASK), "held_out": held_out})
    assert (guards.spared, guards.choosing) == (spared, choosing)


def test_a_guard_may_be_a_named_task() -> None:
    guard = recipe({"tasks": {"school": {"name": "gsm8k", "max_new_tokens": 64, "margin": 0.02}}}).guards.tasks["school"]
    assert (guard.scorer, guard.margin) == ("number", 0.02)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"tasks": {"task": TASK}}, "'task' is what the task itself is called"),
        ({"tasks": {"../x": TASK}}, "guards.tasks"),
        ({"tasks": {"a": {**TASK, "margin": 0}}}, "margin"),
        ({"tasks": {"a": {**TASK, "margin": 1}}}, "margin"),
        ({"tasks": {"a": {**TASK, "scorer": "exat"}}}, "nearest: exact"),
        ({"tasks": {"reversal": TASK}, "held_out": "reverse"}, "nearest: reversal"),
        ({"text": {"tokens": 1}}, "tokens"),
        ({"texts": None}, "Did you mean"),
    ],
)
def test_what_cannot_be_a_guard_is_refused(guards: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(guards)


@pytest.mark.parametrize(
    ("sweep", "guards", "message"),
    [
        ({"objective": {}}, {"tasks": {"a": TASK}}, "without a `price` or a `veto` has no effect"),
        ({"objective": {"price": -1}}, {"tasks": {"a": TASK}}, "price"),
        ({"objective": {"veto": True}}, None, "none that is not held out"),
        ({"objective": {"price": 1}}, {"tasks": {"a": TASK}}, "none that is not held out"),
        (
            {"objective": {"price": 1}},
            {"tasks": {"a": TASK, "b": {**LOSS, "margin": 0.2}, "c": TASK}},
            "one exchange rate",
        ),
        (
            {"objective": {"veto": True}, "primary": {"by": "lae", "k": 4}},
            {"tasks": {"a": TASK}},
            "`objective` has no effect with `primary`",
        ),
        ({"channels": [0.1]}, None, "needs a ranker that scores channels"),
        ({"channels": [1.0]}, None, "less than 1"),
        ({"channels": [0.1, 0.1]}, None, "has a value twice"),
    ],
)
def test_what_has_no_effect_is_refused(sweep: dict[str, Any], guards: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(guards, **sweep)


@pytest.mark.parametrize("ranker", ["attribution", "channel", "reverse:channel"])
def test_channels_need_a_ranker_that_scores_them(ranker: str) -> None:
    assert recipe(rank={"by": ["lae", ranker]}, channels=[0.1, 0.2]).sweep.channels == (0.1, 0.2)


def test_data_of_guards_is_relative_to_the_recipe(tmp_path: Path) -> None:
    made = content({"tasks": {"a": TASK}, "text": {"data": "text.jsonl"}})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    guards = load_recipe(tmp_path / "r.yaml").guards
    assert guards.tasks["a"].data == str(tmp_path / "d.jsonl")
    assert guards.text is not None
    assert guards.text.data == str(tmp_path / "text.jsonl")


@pytest.mark.parametrize("change", [{"held_out": "a"}, {"text": None}, {"tasks": {"a": TASK}}])
def test_the_identity_changes_with_the_guards(change: dict[str, Any]) -> None:
    two = {"tasks": {"a": TASK, "b": {**TASK, "data": "e.jsonl"}}}
    assert recipe({**two, **change}).identity() != recipe(two).identity()


def test_a_penalty_that_nothing_pays_is_refused() -> None:
    made = {**content({"text": None}), "search": "gates"}
    with pytest.raises(RecipeError, match=r"`search.gates.penalty` has no effect"):
        parse_recipe(made)
    assert parse_recipe({**made, "search": {"gates": {"penalty": [0]}}}).search is not None
    assert parse_recipe({**made, "guards": {"text": None, "tasks": {"a": TASK, "b": TASK}}}).search is not None


def test_a_screen_has_no_effect_on_losses() -> None:
    made = {**content(screen={"keep": 0.5}), "task": LOSS}
    with pytest.raises(RecipeError, match=r"`sweep.screen` has no effect with `scorer: loss`"):
        parse_recipe(made)
