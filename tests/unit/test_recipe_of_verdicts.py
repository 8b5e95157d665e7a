"""What a recipe may say of the verdict: arms and a primary trial."""

from __future__ import annotations

from typing import Any

import pytest

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.significance import ALPHA, chance_p
from transplant_ray.recipe import FEWEST_ARMS, Recipe, parse_recipe

PRIMARY = {"by": "lae", "kind": "ffn", "k": 4}


def recipe(rank: dict[str, Any] | None = None, **sweep: Any) -> Recipe:
    task = {"data": "d.jsonl", "prompt": "{a}", "answer": "{b}", "max_new_tokens": 4}
    models = {"source": {"model": "s"}, "target": {"model": "t"}}
    return parse_recipe({"name": "r", **models, "task": task, "rank": rank or {}, "sweep": {"k": [4, 8], "kind": ["ffn"], **sweep}})


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({}, 0),
        ({"arms": 0}, 0),
        ({"arms": 40}, 40),
        ({"primary": PRIMARY}, 19),
        ({"primary": PRIMARY, "arms": 99}, 99),
    ],
)
def test_a_primary_trial_brings_its_arms(sweep: dict[str, Any], expected: int) -> None:
    assert recipe(**sweep).sweep.num_arms == expected


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"arms": 18}, "with fewer than 19 arms no winner can have a p of 0.05"),
        ({"arms": -1}, "with fewer than 19 arms"),
        ({"primary": {**PRIMARY, "k": 5}}, "`primary.k` is 5, which is not in the grid .4, 8."),
        ({"primary": {**PRIMARY, "kind": "attn"}}, "`primary.kind` is 'attn', which is not in the grid"),
        ({"primary": {**PRIMARY, "by": "depth"}}, "`sweep.primary.by` is 'depth', which is not in `rank.by`"),
        ({"primary": PRIMARY, "alpha": [0.5, 1]}, "`primary` names one trial, and there are several `alpha`"),
        ({"primary": PRIMARY, "screen": {"keep": 0.5}}, "`screen` and `race` choose among trials"),
        ({"primary": PRIMARY, "race": {"rungs": [5]}}, "`screen` and `race` choose among trials"),
    ],
)
def test_what_cannot_be_is_refused(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**sweep)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({"by": ["reverse:lea"]}, "unknown ranker 'lea'.*nearest: lae"),
        ({"by": ["reverse:reverse:lae"]}, "unknown ranker"),
        ({"by": ["attribution"], "trajectory": "source"}, "has no effect: none of .* measures activations"),
        ({"by": ["lae"], "steps": 8}, "`steps` has no effect"),
        ({"by": ["attribution"], "steps": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_rankers_that_are_not_there_are_refused(rank: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(rank)


def test_a_reversed_ranker_is_measured_upright() -> None:
    spec = recipe({"by": ["reverse:lae", "attribution", "depth"], "steps": 8, "trajectory": "reference"}).rank
    assert spec.measured == {"lae", "attribution", "depth"}


def test_fewer_arms_than_the_recipe_takes_could_never_confirm() -> None:
    assert chance_p(1, [0] * FEWEST_ARMS) <= ALPHA < chance_p(1, [0] * (FEWEST_ARMS - 1))


def test_what_is_named_beforehand_and_how_finely_is_integrated_change_the_identity() -> None:
    plain, named = recipe({"by": ["attribution", "lae"]}), recipe({"by": ["attribution", "lae"]}, primary=PRIMARY)
    fine = recipe({"by": ["attribution", "lae"], "steps": 8})
    assert len({plain.identity(), named.identity(), fine.identity()}) == 3
