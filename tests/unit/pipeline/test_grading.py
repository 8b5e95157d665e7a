"""Grading: completions find their examples, files are compared on what both answer, and a file that does not fit writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate.metrics import wilson_interval
from transplant_ray.evaluate.row_index import RowIndex
from transplant_ray.evaluate.task import make_example
from transplant_ray.pipeline.grading import GradeReport, grade, report_lines
from transplant_ray.recipe import TaskSpec

QUESTIONS: list[dict[str, Any]] = [{"question": f"What is {n} + {n}?", "answer": f"It is so.\n#### {2 * n}"} for n in range(20)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", QUESTIONS)


def by_number(right: Sequence[int], asked: Sequence[int] = range(20)) -> list[dict[str, Any]]:
    return [{"id": n, "completion": f"#### {2 * n if n in right else -1}"} for n in asked]


def test_completions_are_graded_in_their_order(tmp_path: Path, data: Path) -> None:
    rows = [
        {"id": 7, "completion": "It is 14."},
        {"question": QUESTIONS[3]["question"], "completion": "I do not know"},
        {"id": "0", "completion": "7"},
    ]
    report = grade("gsm8k", write(tmp_path / "a.jsonl", rows), data=data, out=tmp_path / "g.jsonl")
    assert read(tmp_path / "g.jsonl") == [
        {"id": 7, "correct": True, "parsed": True, "extracted": "14"},
        {"id": 3, "correct": False, "parsed": False, "extracted": None},
        {"id": "0", "correct": False, "parsed": True, "extracted": "7"},
    ]
    graded = report.graded
    assert (report.scorer, report.num_examples, graded.n, graded.correct, graded.num_parsed) == ("number", 20, 3, 1, 2)
    assert graded.interval == wilson_interval(1, 3)
    assert "a.jsonl: accuracy 0.333 [0.061–0.792], 1 of 3 right; 66.7 % parsed; 3 of 20 examples answered" in report_lines(report)


def test_two_files_are_paired_on_what_both_answer(tmp_path: Path, data: Path) -> None:
    ours = write(tmp_path / "a.jsonl", by_number(range(12), range(15)))
    theirs = write(tmp_path / "b.jsonl", by_number(range(10, 20), range(19, 3, -1)))
    report = grade("gsm8k", ours, data=data, against=theirs, out=tmp_path / "g.jsonl")
    pairs = report.paired
    assert pairs is not None
    assert (pairs.n, pairs.both, pairs.gained, pairs.lost) == (11, 2, 6, 3)  # 4 to 14: 4…11 against 10…14
    assert pairs.p == pytest.approx(binomtest(6, 9).pvalue, abs=1e-12)
    assert [row["id"] for row in read(tmp_path / "g.jsonl")] == list(range(15))
    lines = "\n".join(report_lines(report))
    assert (
        "on the 11 examples that both answer: 2 right in both, 6 only in a.jsonl, 3 only in b.jsonl, a difference of +27.3" in lines
    )
    assert f"p = {pairs.p:.3g}" in lines


def test_another_scorer_may_be_named(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 1, "completion": "result: 2; 5"}])
    assert grade("gsm8k", path, data=data).graded.correct == 0
    assert grade("gsm8k", path, data=data, scorer=r"regex:(?:result:|####) (\d+)").graded.correct == 1


def test_errors_of_the_scorer_are_counted_and_written(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transplant_ray.evaluate import math_answers

    monkeypatch.setattr(math_answers, "compare", lambda *_: math_answers.Comparison(False, None, "no answer within 5 s"))
    path = write(tmp_path / "a.jsonl", [{"id": 1, "completion": r"\boxed{9^{9}}"}, {"id": 2, "completion": r"\boxed{}"}])
    report = grade("gsm8k", path, data=data, scorer="math", out=tmp_path / "g.jsonl")
    assert (report.graded.num_errors, report.graded.num_parsed) == (1, 1)
    assert [row.get("error") for row in read(tmp_path / "g.jsonl")] == ["no answer within 5 s", None]
    assert "1 timed out or crashed (counted as wrong)" in "\n".join(report_lines(report))


def test_progress_is_told(tmp_path: Path, data: Path) -> None:
    class Log:
        def __init__(self) -> None:
            self.stages: dict[str, list[int]] = {}

        def stage(self, name: str, total: int) -> None:
            self.stages[name] = [total, 0]

        def advance(self, amount: int) -> None:
            list(self.stages.values())[-1][1] += amount

        def note(self, text: str) -> None:
            raise AssertionError(text)

    log = Log()
    paths = [write(tmp_path / name, by_number([])) for name in ("a.jsonl", "b.jsonl")]
    grade("gsm8k", paths[0], against=paths[1], data=data, watch=log)
    assert log.stages == {"grade a.jsonl": [20, 20], "grade b.jsonl": [20, 20]}


# Ids.


def spec(chat: bool) -> TaskSpec:
    return TaskSpec.model_validate({"name": "gsm8k", "max_new_tokens": 1, "chat_template": chat})


@pytest.mark.parametrize("chat", [False, True])
def test_an_example_is_known_by_the_hash_that_sweeps_give_it(tmp_path: Path, data: Path, chat: bool) -> None:
    name = make_example(QUESTIONS[4], spec(chat), "").id
    path = write(tmp_path / "a.jsonl", [{"id": name, "completion": "8"}])
    assert grade("gsm8k", path, data=data).graded.correct == 1


@pytest.mark.parametrize("column", ["unique_id", "id"])
def test_the_datas_own_id_is_preferred(column: str) -> None:
    rows = [{"question": "a", column: "x"}, {"question": "b", column: "y"}]
    index = RowIndex(rows, ["question"], ["hash-a", "hash-b"])
    assert [index.find({"id": name}, "") for name in ("y", "x", 1, "1", "hash-b")] == [1, 0, 1, 1, 1]
    assert index.ids == ("x", "y")
    assert index.find({"question": " b\n"}, "") == 1


def test_where_own_ids_are_numbers_a_number_is_an_id() -> None:
    index = RowIndex([{"question": "a", "id": 1}, {"question": "b", "id": 2}], ["question"])
    assert [index.find({"id": name}, "") for name in (1, "2")] == [0, 1]
    with pytest.raises(
        DataError, match=r"here: id 0 matches no example; an example is known by `id` of the data or its content hash"
    ):
        index.find({"id": 0}, "here")


def test_data_whose_ids_repeat_is_refused() -> None:
    with pytest.raises(DataError, match="column `id` has a value twice"):
        RowIndex([{"question": "a", "id": 1}, {"question": "b", "id": 1}], ["question"])


# What does not fit.


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [{"id": 20, "completion": ""}],
            r"a.jsonl, row 1: id 20 matches no example; an example is known by its row number \(from 0\) or its content",
        ),
        ([{"id": 1.0, "completion": ""}], "id 1.0 matches no example"),
        ([{"id": True, "completion": ""}], "id True matches no example"),
        ([{"id": None, "completion": ""}], "id None matches no example"),
        ([{"id": [1], "completion": ""}], "matches no example"),
        (
            [{"question": "What is 99?", "completion": ""}],
            r"`question` 'What is 99\?' matches no example. Check that task and split",
        ),
        ([{"completion": "x"}], "found 'completion', expected `id` or `question`"),
        ([*by_number([], [0, 1, 2]), by_number([], [1])[0]], "a.jsonl, row 4: answers the same example as row 2"),
        (
            [{"id": 1, "completion": ""}, {"question": QUESTIONS[1]["question"], "completion": ""}],
            "row 2: answers the same example",
        ),
        (
            [{"id": 2, "question": QUESTIONS[1]["question"], "completion": ""}],
            "id 2 is that of row 2, and `question` that of row 1",
        ),
        ([{"id": 1}], "row 1: found no `completion`, expected text under `completion`; keys are id"),
        ([{"id": 1, "completion": None}], "found NoneType, expected text under `completion`"),
        ([{"id": 1, "completion": 5}], "found int, expected text"),
        (["{"], "a.jsonl, line 1: not JSON"),
        (["[1]"], "line 1: found list"),
        ([], "holds no rows"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, data: Path, lines: list[Any], words: str
) -> None:
    good, bad = write(tmp_path / "good.jsonl", by_number([])), write(tmp_path / "a.jsonl", lines)
    for completions, against in ((bad, None), (good, bad)):
        with pytest.raises(DataError, match=words):
            grade("gsm8k", completions, against=against, data=data, out=tmp_path / "g.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "good.jsonl", "a.jsonl"}


def run(tmp_path: Path, **changes: Any) -> GradeReport:
    path = write(tmp_path / "a.jsonl", by_number([]))
    write(tmp_path / "data.jsonl", QUESTIONS)
    given = {"task": "gsm8k", "completions": path, "data": tmp_path / "data.jsonl", "out": tmp_path / "g.jsonl", **changes}
    return grade(given.pop("task"), given.pop("completions"), **given)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": "gsm8"}, RecipeError, "--task gsm8: no such task; expected one of math500, gsm8k. Did you mean gsm8k"),
        ({"task": "math500"}, DataError, "row 1, `prompt`: no column 'problem'"),
        ({"scorer": "nummber"}, RecipeError, "--scorer nummber: unknown scorer 'nummber'.*nearest: number"),
        ({"scorer": "forced"}, RecipeError, "looks at no completion"),
        ({"scorer": "regex:a"}, RecipeError, "the pattern has 0 groups, expected one"),
        ({"completions": "none.jsonl"}, DataError, "none.jsonl: no such file. Give completions as JSONL"),
        ({"against": "none.jsonl"}, DataError, "none.jsonl: no such file"),
        ({"data": "none.jsonl"}, DataError, "none.jsonl: no such file"),
        ({"data": None}, DataError, "openai/gsm8k: the hub dataset cannot be loaded.* Or name a local copy: --data FILE"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(tmp_path, **changes)
    assert not (tmp_path / "g.jsonl").exists()


def test_out_is_neither_an_input_nor_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is one of the files that are read"):
        run(tmp_path, out=tmp_path / "." / "a.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        run(tmp_path, out=tmp_path)
    assert read(tmp_path / "a.jsonl") == by_number([])


def test_files_without_a_common_example_are_not_compared(tmp_path: Path, data: Path) -> None:
    ours, theirs = (write(tmp_path / name, by_number([], [n])) for name, n in (("a.jsonl", 1), ("b.jsonl", 2)))
    with pytest.raises(DataError, match="no example is answered by both"):
        grade("gsm8k", ours, against=theirs, data=data)
