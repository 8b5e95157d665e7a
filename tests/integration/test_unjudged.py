"""A sweep whose scorers hang: on a pattern that backtracks without an end, and on a reference that sympy never finishes with.

The limits are those that a sweep has, for they hold where models answer; what hangs does so once in every process.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from integration.helpers import SPLIT, Place, Swept, plain_completion, run_main
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from transplant_ray.evaluate.math_answers import compare
from transplant_ray.evaluate.task import load_task
from transplant_ray.recipe import TaskSpec

pytestmark = pytest.mark.slow
HOSTILE = "9^{9^{9^{9}}}"
GUARD_SPLIT = {"probe": 2, "select": 4, "test": 6}
HANGS = "(?:(?:(?:.?){20}){20}){20}(?!)"
"""Four characters are put into eight thousand places in every way, and then it must not match."""
NO_MATCH, NO_ANSWER = "no match within 5 s", "no answer within 5 s"


@dataclass(frozen=True)
class Hung:
    swept: Swept
    text: str
    """On which the pattern hangs."""

    def outcomes(self, name: str) -> pd.DataFrame:
        """With what would have been right."""
        examples = pd.read_parquet(self.swept.folder / "examples.parquet")[["example", "answer"]]
        found = pd.read_parquet(self.swept.folder / "outcomes" / f"{name}.parquet")
        return found.merge(examples, on="example", validate="many_to_one")


def common_answer(spec: dict[str, Any]) -> str:
    """Of four characters, a reference in select and in test: what hangs costs its limit once in every process."""
    task = load_task(TaskSpec.model_validate(spec))
    answers = {example.answer for example in task.select} & {example.answer for example in task.test}
    return min(answer for answer in answers if re.fullmatch(r"\w{4}", answer))


def write_sums(path: Path, place: Place) -> dict[str, Any]:
    """A guard with one hostile reference, in its test split, which what the target says has to be compared with."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place.path / "target"), tiny_tokenizer()
    prompts = [f"say {n}=" for n in range(150)]
    said = {prompt: compare(plain_completion(model, tokenizer, prompt), "5").parsed for prompt in prompts}
    numbers = [(prompt, number) for prompt, number in said.items() if number is not None][:12]
    rows = [{"prompt": prompt, "answer": number if place else HOSTILE} for place, (prompt, number) in enumerate(numbers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {**place.task, "data": str(path), "scorer": "math"}
    specs = ({**spec, "split": {**GUARD_SPLIT, "seed": seed}} for seed in range(50))
    return next(s for s in specs if any(e.answer == HOSTILE for e in load_task(TaskSpec.model_validate(s)).test))


@pytest.fixture(scope="module")
def hung(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Hung:  # noqa: ARG001
    place = template.copy(tmp_path_factory.mktemp("hung"))
    text = common_answer(place.task)
    pattern = rf"(?s)\A(?:(?=\s*{text}\s*\Z){HANGS}|(.+))"
    recipe = place.recipe(
        name="hung",
        task={**place.task, "scorer": {"regex": pattern}},
        guards={"tasks": {"sums": write_sums(place.path / "sums.jsonl", place)}, "text": None},
        sweep={"k": [3], "kind": ["all"], "loss": False},
        rank={"by": ["depth"]},
    )
    return Hung(Swept(place.path / "runs" / "hung", place, run_main("sweep", recipe)), text)


def test_the_sweep_ends_well(hung: Hung) -> None:
    assert hung.swept.finished.code == 0, hung.swept.finished.err
    results = hung.swept.results
    assert results["error"].isna().all()
    assert set(results["split"]) == {"select", "test"}
    assert hung.swept.summary["failed"] == []
    assert (hung.swept.folder / "checkpoint" / "model.safetensors").exists()


@pytest.mark.parametrize("split", ["select", "test"])
def test_what_hangs_the_pattern_is_wrong_and_all_else_is_judged(hung: Hung, split: str) -> None:
    outcomes = hung.outcomes(split)
    hangs = (outcomes["completion"].str.strip() == hung.text) | (outcomes["answer"] == hung.text)
    assert hangs.any()
    assert set(outcomes[hangs]["error"]) == {NO_MATCH}
    assert not outcomes[hangs]["correct"].any()
    judged = outcomes[~hangs]
    assert judged["error"].isna().all()
    assert (judged["correct"] == (judged["completion"].str.strip() == judged["answer"].str.strip())).all()
    assert judged["correct"].any()


def test_what_hangs_sympy_is_wrong_and_the_next_answers_are_judged(hung: Hung) -> None:
    outcomes = hung.outcomes("guard-sums-test")
    hostile = outcomes["answer"] == HOSTILE
    assert not outcomes[hostile]["correct"].any()
    errors = outcomes[hostile].set_index("variant")["error"]
    assert errors["44136fa355"] == NO_ANSWER  # the target, which says a number there
    assert set(errors.dropna()) == {NO_ANSWER}
    assert outcomes[~hostile]["error"].isna().all()
    assert outcomes[~hostile & (outcomes["variant"] == "44136fa355")]["correct"].all()


def test_they_are_counted_and_count_as_wrong(hung: Hung) -> None:
    files = {split: (split, f"guard-sums-{split}") for split in ("select", "test")}
    errors = {split: sum(int(hung.outcomes(name)["error"].notna().sum()) for name in names) for split, names in files.items()}
    assert hung.swept.summary["unjudged"] == errors
    assert min(errors.values()) > 0
    select = hung.outcomes("select").groupby("variant")["correct"].sum()
    for row in hung.swept.results.query("split == 'select'").itertuples():
        assert (row.n, row.correct) == (SPLIT["select"], select[row.variant])
