"""Results: one row per planned variant and split, and the rule that picks the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from transplant_ray.evaluate.choosing import Candidate, choose
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.metrics import perplexity_kept, recovery, tir
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
    """Mean token loss of the reference answers, where it was measured. Where it is the score, the interval is its."""
    stopped: Stopped | None = None
    """Why it was not evaluated on all examples; None where it was, or failed."""
    channels: float | None = None
    """Share of the channels of each chosen module; None where whole modules were."""
    penalty: float | None = None
    """What a fitted variant paid for what the guards lose."""
    size: float | None = None
    """Modules changed, those of which some channels are by their share."""
    parsed: int | None = None
    """Completions that the scorer could read an answer out of."""
    cut_off: int | None = None
    """Completions that the limit of new tokens ended; None where nothing was decoded."""
    moved: float | None = None
    """Share of the norm of source − target that was moved."""
    kl: float | None = None
    """KL(target ‖ variant) on general text, nats a token."""
    guard_share: float | None = None
    """Accuracy on the guards ÷ the target's (of a guard by loss: the target's perplexity ÷ its own), mean over the guards."""
    score: float | None = None
    """What variants are compared by, more is better: the accuracy, or minus the loss where the task's scorer is `loss`."""
    worth: float | None = None
    """What a trial was chosen by: the score, less what the guards lost at the recipe's price."""
    worth_error: float | None = None
    """Standard error of it."""
    vetoed_by: str | None = None
    """A guard whose loss rules the trial out."""

    @property
    def label(self) -> str:
        return describe_point(self)

    @property
    def value(self) -> float | None:
        """The score as people read it: the accuracy, or the loss."""
        return self.score if self.accuracy is not None or self.score is None else -self.score


@dataclass(frozen=True)
class GuardResult:
    """One row of guards.parquet: what a variant does to one guard."""

    variant: str
    label: str
    role: PlanRole
    guard: str
    held_out: bool
    split: Split
    n: int
    correct: int | None
    accuracy: float | None
    ci_low: float | None
    ci_high: float | None
    share: float | None
    """Accuracy ÷ the target's, None where that is 0; the target's perplexity ÷ its own where the guard's scorer is `loss`."""
    winner: bool
    loss: float | None = None


COUNTED = [
    ("n", pa.int32()),
    ("correct", pa.int32()),
    ("accuracy", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
]
"""Columns of an accuracy."""

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
        *COUNTED,
        ("tir", pa.float64()),
        ("recovery", pa.float64()),
        ("num_modules", pa.int32()),
        ("num_parameters", pa.int64()),
        ("seconds", pa.float64()),
        ("winner", pa.bool_()),
        ("error", pa.string()),
        ("loss", pa.float64()),
        ("stopped", pa.string()),
        ("channels", pa.float64()),
        ("penalty", pa.float64()),
        ("size", pa.float64()),
        ("parsed", pa.int32()),
        ("cut_off", pa.int32()),
        ("moved", pa.float64()),
        ("kl", pa.float64()),
        ("guard_share", pa.float64()),
        ("score", pa.float64()),
        ("worth", pa.float64()),
        ("worth_error", pa.float64()),
        ("vetoed_by", pa.string()),
    ]
)

GUARD_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("label", pa.string()),
        ("role", pa.string()),
        ("guard", pa.string()),
        ("held_out", pa.bool_()),
        ("split", pa.string()),
        *COUNTED,
        ("share", pa.float64()),
        ("winner", pa.bool_()),
        ("loss", pa.float64()),
    ]
)


EXAMPLE_SCHEMA = pa.schema([(name, pa.string()) for name in ("task", "split", "example", "prompt", "answer")])
"""Rows of examples.parquet: what was asked."""

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
        ("loss", pa.float64()),
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
    decoded: bool = True,
) -> Result:
    """The row of one planned variant. `target` and `source` are the baselines on the same split, None where they failed.

    `decoded` is off where references were read instead.
    """
    row = Result(
        planned.id, planned.role, planned.ranker, planned.kind, planned.k, planned.alpha, planned.seed, split,
        n=tally.n, correct=None, accuracy=None, ci_low=None, ci_high=None, tir=None, recovery=None,
        num_modules=len(planned.variant.coefficients), num_parameters=num_parameters(planned.variant, modules),
        seconds=tally.seconds, winner=False, error=tally.error,
        channels=planned.channels, penalty=planned.penalty, size=None if planned.role == "source" else planned.size,
    )  # fmt: skip
    if tally.error is not None or tally.n == 0:
        return row
    low, high = tally.interval or (None, None)
    row = replace(
        row,
        score=tally.score,
        ci_low=low,
        ci_high=high,
        worth=tally.score,
        worth_error=tally.score_error,
        recovery=recovery(tally.score, target=target.score, source=source.score) if target and source else None,
    )
    if tally.loss is not None:
        return replace(row, loss=tally.loss)
    return replace(
        row,
        correct=tally.correct,
        accuracy=tally.accuracy,
        parsed=tally.parsed,
        cut_off=tally.cut_off if decoded else None,
        tir=tir(tally.accuracy, target=target.accuracy) if target else None,
    )


def guard_result(planned: Planned, guard: str, split: Split, tally: Tally, target: Tally | None, *, held_out: bool) -> GuardResult:
    low, high = tally.interval or (None, None)
    row = GuardResult(
        planned.id, planned.label, planned.role, guard, held_out, split, tally.n, None, None, low, high, share=None, winner=False
    )
    if tally.loss is not None:
        kept = perplexity_kept(tally.loss, target=target.loss) if target and target.loss is not None else None
        return replace(row, loss=tally.loss, share=kept)
    share = tir(tally.accuracy, target=target.accuracy) if target else None
    return replace(row, correct=tally.correct, accuracy=tally.accuracy, share=share)


def choose_winner(results: Sequence[Result]) -> Result | None:
    """The trial that the rule of `choose` picks; None where there is none to pick.

    One without a worth failed, or has not answered all that it would be chosen by. One that was stopped early has seen fewer
    examples than the others and cannot win. Only trials can: a full swap is nearly the source and always wins on accuracy alone
    (method.md, "Transplant and sweep").
    """
    trials = [r for r in results if r.role == "trial" and r.worth is not None and r.stopped is None]
    trials.sort(key=lambda trial: trial.variant)
    place = choose([_candidate(trial) for trial in trials])
    return None if place is None else trials[place]


def _candidate(row: Result) -> Candidate:
    assert row.worth is not None
    assert row.worth_error is not None
    return Candidate(row.worth, row.worth_error, row.size or 0, row.num_parameters, row.vetoed_by)
