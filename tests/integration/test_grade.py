"""`grade` from the command line, and the public answers: gold is right, shuffled gold only where two answers are equal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from integration.helpers import REPOSITORY, run_main

from transplant_ray.evaluate.boxed import normalise
from transplant_ray.evaluate.math_answers import compare
from transplant_ray.evaluate.scorers import find_scorer

DATA = REPOSITORY.parent / "shared" / "data"


def read(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scorer", ["math", "strict_boxed"])
def test_all_gold_solutions_of_math500_are_right(scorer: str) -> None:
    grades = [find_scorer(scorer)(row["solution"], f"\\boxed{{{row['answer']}}}") for row in read("math500/test.jsonl")]
    assert [grade.correct for grade in grades] == [True] * 500
    assert all(grade.parsed and grade.error is None for grade in grades)


def test_all_gold_solutions_of_math500_are_right_as_mathematics() -> None:
    # `math` needs no algebra where texts are equal; here it is all algebra.
    assert sum(compare(row["solution"], row["answer"]).correct for row in read("math500/test.jsonl")) == 500


def test_shuffled_gold_solutions_are_right_only_where_the_answers_are_equal() -> None:
    rows = read("math500/test.jsonl")
    scorer, answers = find_scorer("math"), [row["answer"] for row in rows]
    random.Random(0).shuffle(answers)
    right = [scorer(row["solution"], answer).correct for row, answer in zip(rows, answers, strict=True)]
    equal = [normalise(row["answer"]) == normalise(answer) for row, answer in zip(rows, answers, strict=True)]
    assert right == equal
    assert 0 < sum(right) < 25


def test_all_gold_answers_of_gsm8k_are_right() -> None:
    rows, scorer = read("gsm8k/test.jsonl"), find_scorer("number")
    golds = [row["answer"].split("####")[1].strip() for row in rows]
    for completions in ([row["answer"] for row in rows], [f"So it is ${gold}.00." for gold in golds]):
        for references in ([row["answer"] for row in rows], golds):
            grades = [scorer(said, reference) for said, reference in zip(completions, references, strict=True)]
            assert [grade.correct for grade in grades] == [True] * 1319


@pytest.mark.parametrize(("task", "said", "n"), [("math500", "solution", 500), ("gsm8k", "answer", 1319)])
def test_gold_graded_from_the_command_line_is_right(tmp_path: Path, task: str, said: str, n: int) -> None:
    rows = read(f"{task}/test.jsonl")
    order = list(range(n))
    random.Random(1).shuffle(order)
    names = [rows[number].get("unique_id", number) for number in order]
    gold = [{"id": name, "completion": rows[number][said]} for name, number in zip(names, order, strict=True)]
    silent = [{key: row[key] for key in ("problem", "question") if key in row} | {"completion": ""} for row in rows]
    finished = run_main(
        "grade", "--task", task, "--data", DATA / task / "test.jsonl", "--completions", write(tmp_path / "a.jsonl", gold),
        "--against", write(tmp_path / "b.jsonl", silent), "--out", tmp_path / "g.jsonl",
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert f"a.jsonl: accuracy 1.000 [0.99{2 if n == 500 else 7}–1.000], {n} of {n} right; 100.0 % parsed" in finished.out
    assert f"{n} only in a.jsonl, 0 only in b.jsonl, a difference of +100.0 points" in finished.out
    graded = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert [(row["id"], row["correct"], row["parsed"]) for row in graded] == [(name, True, True) for name in names]


def test_completions_that_do_not_fit_end_with_2_and_no_file(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"question": "What is 1 + 1?", "answer": "#### 2"}])
    completions = write(tmp_path / "a.jsonl", [{"id": "nobody", "completion": "2"}])
    finished = run_main("grade", "--task", "gsm8k", "--data", data, "--completions", completions, "--out", tmp_path / "g.jsonl")
    assert (finished.code, finished.out) == (2, "")
    assert "DataError" in finished.err
    assert "id 'nobody' matches no example" in finished.err
    assert not (tmp_path / "g.jsonl").exists()
