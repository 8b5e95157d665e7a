"""What `prepare` makes of a task: limits, shots, and what it refuses before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_tokenizer, write_recipe

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate import math_answers
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.recipe import load_recipe

ROWS = [{"q": f"{n}+1=", "options": [str(n + 1), "no"], "gold": "A"} for n in range(14)]
SPLIT = {"probe": 3, "select": 4, "test": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_tiny(folder / "source", seed=1)
    save_tiny(folder / "target", seed=2)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def job(folder: Path, **task: Any) -> Job:
    given = {"data": str(folder / "rows.jsonl"), "prompt": "{q}", "answer": "{gold}", "split": SPLIT, **task}
    return prepare(load_recipe(write_recipe(folder, task=given)))


def test_a_task_of_choices_is_as_long_as_its_longest_choice(folder: Path) -> None:
    made = job(folder, scorer="choice", choices="options", shots={"num": 2, "separator": "\n"})
    examples = [example for examples in made.examples.values() for example in examples]
    assert {split: len(examples) for split, examples in made.examples.items()} == SPLIT
    assert made.generation.max_new_tokens == made.probe_settings.max_new_tokens == 2
    assert made.rules.scorer == "choice"
    assert {len(example.choices) for example in examples} == {2}
    text = tiny_tokenizer().decode(examples[0].prompt_ids, skip_special_tokens=True)
    assert text.count("\n") == 2


def test_choices_must_fit_into_the_positions(folder: Path) -> None:
    with pytest.raises(DataError, match="exceed the model's 128 positions"):
        job(folder, scorer="choice", choices=["{options}", "x" * 130], answer="{options}")


def test_a_scorer_whose_library_is_missing_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(folder, scorer="math", max_new_tokens=4)
    monkeypatch.setattr(math_answers, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="`scorer: math`: the library math-verify is not installed"):
        job(folder, scorer="math", max_new_tokens=4)
    job(folder, scorer="number", max_new_tokens=4)


def test_references_are_read_where_they_can_be(folder: Path) -> None:
    """A measurement that nobody asked for refuses nothing: where a reference is too long for the model, it is left out."""
    assert job(folder, max_new_tokens=4).reads_references
    assert not job(folder, max_new_tokens=4, answer="{gold}" + "x" * 127).reads_references
    assert not job(folder, scorer="loss").reads_references
    assert job(folder, scorer="loss").generation.max_new_tokens == 2
