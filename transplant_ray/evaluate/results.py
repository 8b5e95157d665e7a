"""Results: one row per planned variant and split, and the rule that picks the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from transplant_ray.evaluate.arms import choose
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.metrics import recovery, tir, wilson_interval
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.graft.plan import Planned, PlanRole, describe_point, num_parameters
from transplant_ray.models.catalogue import Module

Stopped = Literal["screened", "raced"]


@dataclass(frozen=True)
class Result:
    """One row of results.parquet. Metrics are None where they are undefined or the variant failed."""

    variant: str
    role: PlanRole
    ranker: str | None
    kind: str | None
    k: int | None
    alpha: float | None
    seed: int | None
    split: Split
    n: int
    correct: int | None
    accuracy: float | None
    ci_low: float | None
    ci_high: float | None
    tir: float | None
    recovery: float | None
    num_modules: int
    num_parameters: int
    seconds: float | None
    winner: bool
    error: str | None
    loss: float | None = None
    """Mean token loss of the reference answers, where it was measured."""
    stopped: Stopped | None = None
    """Why it was not evaluated on all examples; None where it was, or failed."""

    @property
    def label(self) -> str:
        return describe_point(self.role, self.ranker, self.kind, self.k, self.alpha, self.seed)


RESULT_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("role", pa.string()),
        ("ranker", pa.string()),
        ("kind", pa.string()),
        ("k", pa.int32()),
        ("alpha", pa.float64()),
        ("seed", pa.int32()),
        ("split", pa.string()),
        ("n", pa.int32()),
        ("correct", pa.int32()),
        ("accuracy", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("tir", pa.float64()),
        ("recovery", pa.float64()),
        ("num_modules", pa.int32()),
        ("num_parameters", pa.int64()),
        ("seconds", pa.float64()),
        ("winner", pa.bool_()),
        ("error", pa.string()),
        ("loss", pa.float64()),
        ("stopped", pa.string()),
    ]
)


OUTCOME_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("example", pa.string()),
        ("completion", pa.string()),
        ("correct", pa.bool_()),
        ("num_tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("num_close", pa.int32()),
        ("parsed", pa.bool_()),
        ("error", pa.string()),
    ]
)


def make_result(
    planned: Planned,
    tally: Tally,
    split: Split,
    modules: Mapping[str, Module],
    *,
    target: Tally | None,
    source: Tally | None,
) -> Result:
    """The row of one planned variant. `target` and `source` are the baselines on the same split, None where they failed."""
    row = Result(
        planned.id, planned.role, planned.ranker, planned.kind, planned.k, planned.alpha, planned.seed, split,
        n=tally.n, correct=None, accuracy=None, ci_low=None, ci_high=None, tir=None, recovery=None,
        num_modules=len(planned.variant.coefficients), num_parameters=num_parameters(planned.variant, modules),
        seconds=tally.seconds, winner=False, error=tally.error,
    )  # fmt: skip
    if tally.error is not None or tally.n == 0:
        return row
    low, high = wilson_interval(tally.correct, tally.n)
    return replace(
        row,
        correct=tally.correct,
        accuracy=tally.accuracy,
        ci_low=low,
        ci_high=high,
        tir=tir(tally.accuracy, target=target.accuracy) if target else None,
        recovery=recovery(tally.accuracy, target=target.accuracy, source=source.accuracy) if target and source else None,
    )


def choose_winner(results: Sequence[Result]) -> Result | None:
    """The smallest K within one standard error of the best trial, then the fewest parameters; None without a trial.

    A trial that was stopped early has seen fewer examples than the others and cannot win.

    Only trials can win: a full swap is nearly the source and always wins on accuracy alone (method.md, "Transplant and sweep").
    """
    trials = [r for r in results if r.role == "trial" and r.accuracy is not None and r.stopped is None]
    if not trials:
        return None
    trials.sort(key=lambda trial: trial.variant)
    accuracies = [trial.accuracy for trial in trials if trial.accuracy is not None]
    return trials[choose(accuracies, [trial.k or 0 for trial in trials], [trial.num_parameters for trial in trials], trials[0].n)]
