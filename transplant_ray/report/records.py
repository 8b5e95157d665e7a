"""Rows of a run's tables as the report reads them: what an older version did not measure is None, what is damaged is a RunError."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isnan
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from transplant_ray.errors import RunError
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.results import Result
from transplant_ray.graft.plan import PlanRole


class Record(BaseModel):
    """A row. Columns that it does not name are left out, NaN is None."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @field_validator("*", mode="before")
    @classmethod
    def _number_or_none(cls, value: Any) -> Any:
        return None if isinstance(value, float) and isnan(value) else value


R = TypeVar("R", bound=Record)


class Row(Record):
    """One variant on one split: a row of results.parquet."""

    label: str
    variant: str
    role: PlanRole
    split: Split
    n: int
    accuracy: float | None
    ranker: str | None = None
    kind: str | None = None
    k: int | None = None
    alpha: float | None = None
    seed: int | None = None
    correct: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    tir: float | None = None
    recovery: float | None = None
    num_modules: int = 0
    num_parameters: int | None = None
    seconds: float | None = None
    winner: bool = False
    error: str | None = None
    loss: float | None = None
    stopped: str | None = None
    moved: float | None = None
    """Share of ‖Ws − Wt‖ over all modules that the variant moves."""
    kl: float | None = None
    """KL(target ‖ variant) on general text, nats per token."""
    guard_share: float | None = None
    """Mean over guards of accuracy ÷ the target's."""
    score: float | None = None
    """What variants are compared by, more is better: the accuracy, or minus the loss."""
    parsed: int | None = None
    cut_off: int | None = None
    channels: float | None = None
    """Share of the output channels of every chosen module."""
    penalty: float | None = None
    """Weight of the guard loss under which gates were fitted."""

    @model_validator(mode="before")
    @classmethod
    def _scored(cls, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs of before there were losses have accuracies alone."""
        return row if row.get("score") is not None else {**row, "score": row.get("accuracy")}

    @property
    def value(self) -> float | None:
        """The score as people read it: the accuracy, or the loss."""
        return self.score if self.accuracy is not None or self.score is None else -self.score

    @property
    def size(self) -> int:
        """K, or the number of changed modules where the variant is not a top-K set."""
        return self.num_modules if self.k is None else self.k

    @property
    def panel(self) -> str:
        """The kind, under which it is drawn; what was fitted over all modules may have none."""
        return self.kind or "all"

    @property
    def measured(self) -> bool:
        """On all examples of its split: comparable with the others. One that failed at a guard alone is."""
        return self.score is not None and self.stopped is None


class Score(Record):
    """One module by one ranker: a row of rankings.parquet."""

    ranker: str
    rank: int
    module: str
    layer: int
    kind: str
    projection: str
    score: float


class GuardRow(Record):
    """One variant on one guard and split: a row of guards.parquet."""

    variant: str
    label: str
    role: str
    guard: str
    split: Split
    n: int
    accuracy: float | None
    held_out: bool = False
    """Nothing was fitted on this guard."""
    correct: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    loss: float | None = None
    share: float | None = None
    """Accuracy ÷ the target's, or the target's perplexity ÷ its own."""

    @property
    def value(self) -> float | None:
        return self.loss if self.accuracy is None else self.accuracy


class Answer(Record):
    """One completion: a row of outcomes/SPLIT.parquet."""

    variant: str
    example: str
    completion: str
    correct: bool
    loss: float | None = None


class Asked(Record):
    """One example: a row of examples.parquet."""

    example: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Measure:
    """How the score of a task is spoken of."""

    name: str
    axis: str
    unit: str
    """Of differences."""
    interval: str
    """Whose intervals the values have."""
    test: str
    """What tells two variants apart."""
    factor: float
    """From a difference of scores to one in `unit`."""
    digits: int
    """Of a difference."""


ACCURACY = Measure("accuracy", "accuracy", "points", "Wilson", "exact McNemar", 100.0, 1)
LOSS = Measure("loss", "loss, nats a token (less is better),", "nats", "Student", "paired t-test", 1.0, 3)


def measure_of(rows: Iterable[Row]) -> Measure:
    return LOSS if any(row.score is not None and row.accuracy is None for row in rows) else ACCURACY


def read_records(kind: type[R], rows: Iterable[Mapping[str, Any]], path: Path) -> list[R]:
    """RunError where a column is missing or holds what it cannot."""
    try:
        return [kind.model_validate(row) for row in rows]
    except ValidationError as error:
        found = error.errors()[0]
        column = ".".join(map(str, found["loc"]))
        raise RunError(
            f"{path}: column {column!r}: {found['msg']}. Expected a table that `transplant-ray sweep` wrote. Run the sweep again."
        ) from error


def with_label(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of results.parquet, and the label that the sweep gave the variant."""
    known = {field.name: raw.get(field.name) for field in fields(Result)}
    named = known["ranker"] or known["kind"] or known["role"] in ("target", "source", "all")
    return {**raw, "label": Result(**known).label if named else str(known["role"])}  # type: ignore[arg-type]
