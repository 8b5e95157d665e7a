"""The arms of a sweep: random sets that are chosen from as the trials were, and answer on test what the winner answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from transplant_ray.distributed.pool import Pool
from transplant_ray.evaluate.arms import Arms
from transplant_ray.evaluate.choosing import choose
from transplant_ray.graft.plan import Planned
from transplant_ray.pipeline.asking import ask
from transplant_ray.pipeline.guarding import candidate_of, failure
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import MAIN


def evaluate_arms(run: Run, arms: Sequence[Sequence[Planned]], pool: Pool) -> Arms:
    """Every arm chooses on select, where it has a choice, and what it chose answers on test.

    A set that fails cannot be chosen; an arm whose sets all failed, or whose choice failed on test, is left out and named. Where
    the objective vetoes all sets of an arm it chooses without veto: an arm that may choose nothing would flatter the winner.
    """
    sets_each = len(arms[0])
    if sets_each > 1:
        sets = [entry.variant for arm in arms for entry in arm]
        for task in [MAIN, *(run.job.recipe.guards.choosing if run.job.recipe.sweep.objective else ())]:
            with run.stopwatch.stage("arms on select", len(sets) * len(run.job.tasks[task].examples["select"])):
                ask(run, pool, task, "select", sets)
        chosen = [choice for arm in arms if (choice := _choose(run, arm)) is not None]
    else:
        chosen = [entry for arm in arms for entry in arm]
    with run.stopwatch.stage("arms on test", len(chosen) * len(run.job.examples["test"])):
        ask(run, pool, MAIN, "test", [entry.variant for entry in chosen])
    tallies = [run.answers.tallies["test"][entry.id] for entry in chosen]
    scores = tuple(tally.score for tally in tallies if tally.error is None)
    if len(scores) < len(arms):
        run.stopwatch.watch.note(f"arms: {len(arms) - len(scores)} of {len(arms)} failed and are left out")
    if failed := failed_sets(run, arms):
        run.stopwatch.watch.note(f"arms: random sets that failed: {len(failed)}, the first with {failed[0][1]}")
    return Arms(scores, sets_each)


def failed_sets(run: Run, arms: Sequence[Sequence[Planned]]) -> list[tuple[Planned, str]]:
    """The sets that failed at something that they were asked, each once, with the reason: they have no rows that would tell it."""
    sets = {entry.id: entry for entry in chain(*arms)}
    errors = {id: failure(run, "select", id) or failure(run, "test", id) for id in sets}
    return [(sets[id], error) for id, error in errors.items() if error is not None]


def _choose(run: Run, arm: Sequence[Planned]) -> Planned | None:
    weighed = [(entry, candidate) for entry in arm if (candidate := candidate_of(run, entry)) is not None]
    candidates = [candidate for _, candidate in weighed]
    if all(candidate.vetoed_by for candidate in candidates):
        candidates = [replace(candidate, vetoed_by=None) for candidate in candidates]
    place = choose(candidates)
    return None if place is None else weighed[place][0]
