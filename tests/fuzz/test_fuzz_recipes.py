"""Spoilt recipes: each is read, and then can be written and read again as the same one, or is refused by an error of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import YAML_TEXTS, Hand, ends_well
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import file, load_recipe

TASK: dict[str, Any] = {"data": "task.jsonl", "prompt": "{prompt}", "answer": "{answer}", "max_new_tokens": 8}
SPLIT = {"probe": 8, "select": 40, "test": 30, "seed": 1}
RICH: dict[str, Any] = {
    "name": "rich",
    "source": {"model": "./source", "revision": None},
    "target": {"model": "org/target", "revision": "main"},
    "base": {"model": "org/base"},
    "task": {**TASK, "scorer": {"regex": r"answer: (\d+)"}, "stop": ["\n"], "shots": {"num": 2}, "split": SPLIT},
    "guards": {
        "tasks": {"facts": TASK, "loss": {**TASK, "scorer": "exact", "margin": 0.1}},
        "held_out": "loss", "text": {"tokens": 64},
    },
    "rank": {"by": ["lae", "attribution", "reverse:depth"], "steps": 8},
    "sweep": {
        "k": [1, 2, 4], "kind": ["attn", "down_proj"], "alpha": [0.5, 1.0], "channels": [0.1],
        "objective": {"price": 0.5, "veto": True},
        "race": {"rungs": [10, 20]}, "screen": {"keep": 0.5}, "arms": 19,
        "controls": {"random": 3, "merges": ["ties"], "scales": [0.5], "density": 0.4},
    },
    "search": {"gates": {"penalty": [0, 1]}, "greedy": {"k": 3}},
    "resources": {"gpus_per_model": 0.5, "evaluators": 2, "batch_size": "auto"},
    "tracking": {"uri": "http://user:secret@host", "upload": "delta"},
    "storage": "s3://key:secret@bucket/runs",
    "accept": ["vocabulary"],
}  # fmt: skip
"""A recipe with nearly every section."""
RECIPES = [RICH, *(yaml.safe_load(path.read_text()) for path in sorted(Path(__file__).parents[3].glob("jobs/recipes/*.yaml")))]


def write_spoilt(path: Path, seed: int) -> Path:
    hand = Hand(f"recipe {seed}")
    recipe = hand.random.choice(RECIPES)
    way = seed % 4
    if way == 0:
        path.write_bytes(hand.bytes(yaml.safe_dump(recipe).encode()))
    elif way == 1:
        path.write_text(yaml.safe_dump(hand.tree(recipe)))
    else:
        path.write_text(hand.json(recipe, YAML_TEXTS))  # JSON is YAML
    return path


def read(path: Path) -> None:
    recipe = load_recipe(path)
    again = path.with_name("again.yaml")
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again).identity() == recipe.identity()


@pytest.mark.parametrize("seed", range(220))
def test_a_spoilt_recipe_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    ends_well(lambda: read(write_spoilt(tmp_path / "recipe.yaml", seed)))


def test_some_are_read_and_some_are_refused(tmp_path: Path) -> None:
    ends = set()
    for seed in range(30):
        path = write_spoilt(tmp_path / "recipe.yaml", seed)
        ends.add(ends_well(partial(read, path)))
    assert ends == {True, False}
    assert ends_well(lambda: read(write(tmp_path, yaml.safe_dump(RICH))))


@settings(max_examples=30, deadline=None)
@given(
    key=st.sampled_from(["name", "task.split", "sweep.k", "guards.tasks.x.data", "nothing", "task.", "a..b"]) | st.text(),
    text=st.text(),
)
def test_any_override_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, key: str, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_text(yaml.safe_dump(RICH))
    ends_well(lambda: load_recipe(path, [f"{key}={text}"]))


# What the hand has found.


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def bomb(levels: int) -> str:
    """So many aliases of nine of the one before: written out, 9 to the power of `levels` values."""
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lists) + "\n"


def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not valid YAML: with its aliases written out it has more than 1000000"):
        load_recipe(write(tmp_path, bomb(12)))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "? &a [*a]\n: 1", "a: &a [&b [*a], *b]"])
def test_an_alias_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="an alias holds itself"):
        load_recipe(write(tmp_path, text))


def test_aliases_that_stand_for_little_are_welcome(tmp_path: Path) -> None:
    text = yaml.safe_dump({key: value for key, value in RICH.items() if key not in ("task", "guards", "sweep", "search", "base")})
    text += "task: &task {data: x.jsonl, prompt: '{p}', answer: '{a}', max_new_tokens: 2}\n"
    text += "guards: {tasks: {one: *task, two: {<<: *task, margin: 0.2}}}\nsweep: {k: [1]}\n"
    guards = load_recipe(write(tmp_path, text)).guards.tasks
    assert (guards["one"].prompt, guards["two"].prompt, guards["two"].margin) == ("{p}", "{p}", 0.2)


@pytest.mark.parametrize(
    "text",
    ["x" * 2_000_000, "a: [" + "1, " * 700_000 + "]", "".join(f"k{n}: 1\n" for n in range(200_000))],
    ids=["text", "list", "keys"],
)
def test_a_file_that_is_too_long_for_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="more than 1000000 characters"):
        load_recipe(write(tmp_path, text))


def test_a_device_that_never_ends_is_refused() -> None:
    with pytest.raises(RecipeError, match="/dev/zero: "):
        load_recipe("/dev/zero")


def test_of_many_problems_the_first_are_told_and_of_long_values_the_beginning(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, yaml.safe_dump({**RICH, "name": "x" * 5000} | {f"key{n}": n for n in range(500)})))
    told = str(caught.value).splitlines()
    assert len(told) == file.MOST_PROBLEMS + 1
    assert "more" in told[-1]
    assert len(str(caught.value)) < 5000
