"""Guards in a sweep: what a variant does to them, what that costs it, and what the verdict is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

from transplant_ray.evaluate.choosing import Candidate, Guarded, weigh
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import GuardResult, Result, guard_result
from transplant_ray.evaluate.significance import Guard
from transplant_ray.graft.plan import Planned, num_parameters
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import MAIN


def candidate_of(run: Run, entry: Planned) -> Candidate | None:
    """A planned variant as it is chosen on select; None where it failed, or has not answered all that it is chosen by."""
    objective = run.job.recipe.sweep.objective
    tally = run.tally(MAIN, "select", entry.id)
    guards = [_guarded(run, name, entry.id) for name in run.job.recipe.guards.choosing] if objective else []
    if not _whole(run, MAIN, tally) or None in guards:
        return None
    assert tally is not None
    known = [guard for guard in guards if guard is not None]
    return weigh(tally, known, objective, entry.size, num_parameters(entry.variant, run.modules))


def with_guards(run: Run, row: Result, entry: Planned, name: str) -> Result:
    """The row with what the guards say of it, also that it failed at one. `name` is whose answers these are.

    A guard that has no say in choosing takes a trial out of the choice in one case alone, that the trial fails at it: a failed row
    never wins.
    """
    shares = [guard.share for guard in guard_rows(run, entry, row.split, name) if guard.share is not None]
    row = replace(row, guard_share=mean(shares) if shares else None, error=failure(run, row.split, name))
    if entry.role != "trial" or row.split != "select" or row.score is None:
        return row
    candidate = None if row.error else candidate_of(run, entry)
    if candidate is None:
        return replace(row, worth=None, worth_error=None)
    return replace(row, worth=candidate.worth, worth_error=candidate.error, vetoed_by=candidate.vetoed_by)


def failure(run: Run, split: Split, name: str) -> str | None:
    """Why whoever answers under this name failed at the task, or else at guards; None where nothing failed."""
    tallies = {task: run.tally(task, split, name) for task in run.job.tasks}
    errors = {task: tally.error for task, tally in tallies.items() if tally is not None and tally.error is not None}
    return errors.get(MAIN) or "; ".join(f"guard {guard}: {error}" for guard, error in errors.items()) or None


def guard_rows(run: Run, entry: Planned, split: Split, name: str) -> Iterator[GuardResult]:
    """One row per guard that it has answered. `name` is whose answers these are: the variant's, or the exported checkpoint's."""
    for guard in run.job.guards:
        tally = run.tally(guard, split, name)
        if _whole(run, guard, tally, split):
            assert tally is not None
            target = run.tally(guard, split, ORIGIN.id)
            yield guard_result(entry, guard, split, tally, target, held_out=guard == run.job.recipe.guards.spared)


def guards_for_verdict(run: Run, exported: str) -> tuple[tuple[Guard, ...], tuple[str, ...]]:
    """Every guard on test, the held-out one too; and the names of those that the target or the winner failed at."""
    found, missing = [], []
    for name, spec in run.job.recipe.guards.tasks.items():
        target, variant = (run.scores(name, "test", who) for who in (ORIGIN.id, exported))
        if target is None or variant is None:
            missing.append(name)
        else:
            found.append(Guard(name, target, variant, spec.margin, held_out=name == run.job.recipe.guards.spared))
    return tuple(found), tuple(missing)


def _guarded(run: Run, name: str, variant: str) -> Guarded | None:
    target, mine = (run.tally(name, "select", who) for who in (ORIGIN.id, variant))
    if not _whole(run, name, target) or not _whole(run, name, mine):
        return None
    assert target is not None
    assert mine is not None
    return Guarded(name, target, mine, run.job.recipe.guards.tasks[name].margin)


def _whole(run: Run, name: str, tally: Tally | None, split: Split = "select") -> bool:
    return tally is not None and tally.error is None and tally.n == len(run.job.tasks[name].examples[split])
