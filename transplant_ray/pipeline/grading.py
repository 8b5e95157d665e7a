"""`grade`: completions from anywhere, scored as a sweep scores its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate.example import Example
from transplant_ray.evaluate.metrics import wilson_interval
from transplant_ray.evaluate.outcome import READS
from transplant_ray.evaluate.row_index import RowIndex
from transplant_ray.evaluate.scorers import Grade, check_scorer, find_scorer
from transplant_ray.evaluate.significance import McNemar, mcnemar
from transplant_ray.evaluate.task import check_distinct, make_example, read_data
from transplant_ray.files import write_text
from transplant_ray.named_tasks import NAMED_TASKS
from transplant_ray.pipeline.watch import Silent, Watch
from transplant_ray.recipe import TaskSpec
from transplant_ray.rows import Row


@dataclass(frozen=True)
class Completions:
    """A file of completions, in its order."""

    path: Path
    ids: tuple[str | int, ...]
    """As the file gives them; where it gives columns, the example's own id or its number from 0."""
    examples: tuple[int, ...]
    """Number of the example that each one answers, from 0; no two are equal."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Graded:
    completions: Completions
    grades: tuple[Grade, ...]

    @property
    def n(self) -> int:
        return len(self.grades)

    @property
    def correct(self) -> int:
        return sum(grade.correct for grade in self.grades)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy: Wilson, 95 %."""
        return wilson_interval(self.correct, self.n)

    @property
    def num_parsed(self) -> int:
        return sum(grade.parsed is not None for grade in self.grades)

    @property
    def num_errors(self) -> int:
        """Answers that took too long to judge, or made the scorer crash; they count as wrong."""
        return sum(grade.error is not None for grade in self.grades)


@dataclass(frozen=True)
class GradeReport:
    task: str
    scorer: str
    num_examples: int
    """Of the task; a file may answer fewer."""
    graded: Graded
    against: Graded | None = None
    paired: McNemar | None = None
    """From `against` (before) to `graded` (after), on the examples that both answer."""


def grade(
    task: str,
    completions: str | Path,
    *,
    data: str | Path | None = None,
    scorer: str | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> GradeReport:
    """Score a file of completions of a named task, and with `against` test whether it differs from a second one.

    Writes `out`, one object a line. DataError or RecipeError, and nothing is written, where a name, a file or a row does not fit.
    """
    paths = [Path(path) for path in (completions, against) if path is not None]
    if out is not None:
        _check_out(Path(out), [*paths, *([] if data is None else [Path(data)])])
    spec = _make_spec(task, data, scorer)
    rows = _read_rows(spec)
    examples = _make_examples(rows, spec, task)
    index = RowIndex(rows, NAMED_TASKS[task].columns, *_hashes(rows, spec, task))
    files = [_read_completions(path, index) for path in paths]
    common = _common(files)
    graded, *others = (_grade(file, examples, spec.scorer, watch or Silent()) for file in files)
    if out is not None:
        write_text(Path(out), "".join(_lines(graded)))
    report = GradeReport(task, spec.scorer, len(rows), graded)
    return replace(report, against=others[0], paired=_pair(others[0], graded, common)) if others else report


def report_lines(report: GradeReport) -> list[str]:
    """What was found, in sentences."""
    lines = [f"task {report.task}, scorer {report.scorer}"]
    lines += [_graded_line(each, report.num_examples) for each in (report.graded, report.against) if each is not None]
    if report.against is not None and report.paired is not None:
        ours, theirs, pairs = report.graded.completions.path.name, report.against.completions.path.name, report.paired
        lines += [
            f"on the {pairs.n} examples that both answer: {pairs.both} right in both, {pairs.gained} only in {ours}, "
            f"{pairs.lost} only in {theirs}, a difference of {100 * pairs.difference:+.1f} points",
            f"exact McNemar test, two-sided: p = {pairs.p:.3g}",
        ]
    return lines


def _graded_line(graded: Graded, num_examples: int) -> str:
    (low, high), n = graded.interval, graded.n
    errors = f", {graded.num_errors} timed out or crashed (counted as wrong)" if graded.num_errors else ""
    return (
        f"{graded.completions.path.name}: accuracy {graded.correct / n:.3f} [{low:.3f}–{high:.3f}], {graded.correct} of {n} right; "
        f"{100 * graded.num_parsed / n:.1f} % parsed{errors}; {n} of {num_examples} examples answered"
    )


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    if out.resolve() in [path.resolve() for path in inputs]:
        raise DataError(f"--out {out}: is one of the files that are read. Choose another place.")
    if out.is_dir():
        raise DataError(f"--out {out}: is a folder. Give the path of a file.")


def _make_spec(task: str, data: str | Path | None, scorer: str | None) -> TaskSpec:
    if task not in NAMED_TASKS:
        near = difflib.get_close_matches(task, NAMED_TASKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"--task {task}: no such task; expected one of {', '.join(NAMED_TASKS)}.{hint}")
    if scorer in READS:
        raise RecipeError(f"--scorer {scorer}: has a model read the references, and looks at no completion. Use another scorer.")
    given = {key: value for key, value in (("data", data and str(data)), ("scorer", scorer)) if value is not None}
    try:
        return TaskSpec.model_validate({"name": task, "max_new_tokens": 1, **given})  # nothing is generated
    except ValidationError as error:
        raise RecipeError(f"--scorer {scorer}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def _read_rows(spec: TaskSpec) -> list[Row]:
    try:
        return read_data(spec.data)
    except DataError as error:
        if isinstance(spec.data, str):
            raise
        raise DataError(f"{error} Or name a local copy: --data FILE.") from error


def _make_examples(rows: Sequence[Row], spec: TaskSpec, where: str) -> list[Example]:
    where = spec.data if isinstance(spec.data, str) else where
    examples = [make_example(row, spec, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
    check_distinct(examples, where)
    return examples


def _hashes(rows: Sequence[Row], spec: TaskSpec, task: str) -> list[list[str]]:
    """Of the examples as sweeps know them, without a chat template and with one."""
    specs = [spec, TaskSpec.model_validate({"name": task, "max_new_tokens": 1, "chat_template": True})]
    return [[make_example(row, each, task).id for row in rows] for each in specs]


def _read_completions(path: Path, index: RowIndex) -> Completions:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give completions as JSONL, one object with `id` and `completion` a line.")
    rows = read_data(str(path))
    found: dict[int, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        _check_text(row, where)
        example = index.find(row, where)
        if example in found:
            raise DataError(f"{where}: answers the same example as row {found[example]}. Leave one of them out.")
        found[example] = number
    ids = tuple(row.get("id", index.ids[example]) for row, example in zip(rows, found, strict=True))
    return Completions(path, ids, tuple(found), tuple(row["completion"] for row in rows))


def _check_text(row: Row, where: str) -> None:
    if not isinstance(row.get("completion"), str):
        what = type(row["completion"]).__name__ if "completion" in row else "no `completion`"
        raise DataError(f"{where}: found {what}, expected text under `completion`; keys are {', '.join(map(str, row))}.")


def _common(files: Sequence[Completions]) -> list[int]:
    """The examples that all files answer."""
    common = set.intersection(*(set(file.examples) for file in files))
    if not common:
        names = " and ".join(str(file.path) for file in files)
        raise DataError(f"{names}: no example is answered by both. Compare files of the same examples.")
    return sorted(common)


def _grade(file: Completions, examples: Sequence[Example], name: str, watch: Watch) -> Graded:
    check_scorer(name)
    scorer = find_scorer(name)
    watch.stage(f"grade {file.path.name}", len(file.texts))
    grades = []
    for text, example in zip(file.texts, file.examples, strict=True):
        grades.append(scorer(text, examples[example].answer))
        watch.advance(1)
    return Graded(file, tuple(grades))


def _pair(before: Graded, after: Graded, common: Sequence[int]) -> McNemar:
    grades = [dict(zip(each.completions.examples, each.grades, strict=True)) for each in (before, after)]
    return mcnemar(*(np.array([mine[example].correct for example in common]) for mine in grades))


def _lines(graded: Graded) -> Iterator[str]:
    for name, grade in zip(graded.completions.ids, graded.grades, strict=True):
        row: dict[str, Any] = {"id": name, "correct": grade.correct, "parsed": grade.parsed is not None}
        row |= {"extracted": grade.parsed} | ({} if grade.error is None else {"error": grade.error})
        yield json.dumps(row) + "\n"
