"""From the answers of a sweep to its verdict and its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transplant_ray.evaluate.results import Result
from transplant_ray.evaluate.significance import difference_interval, recovery_interval, tir_interval
from transplant_ray.evaluate.verdict import Evidence, Verdict, judge, no_gap
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.models.catalogue import select_kind
from transplant_ray.pipeline.evaluating import Evaluation
from transplant_ray.pipeline.guarding import guards_for_verdict
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import MAIN

EXPORTED = "exported"
"""The name under which the exported checkpoint's outcomes are kept."""


def judge_sweep(evaluation: Evaluation, winner: Result | None) -> Verdict | None:
    """None where the target, the source or the winner failed, so that there is nothing to judge."""
    run = evaluation.run
    select_target, select_source = (run.scores(MAIN, "select", name) for name in (ORIGIN.id, "source"))
    if select_target is None or select_source is None:
        return None
    target, found = (run.scores(MAIN, "test", name) for name in (ORIGIN.id, EXPORTED))
    if winner is None or target is None or found is None:
        return no_gap(select_target, select_source)
    primary = evaluation.plan.primary is not None
    guards, missing = guards_for_verdict(run, EXPORTED)
    return judge(
        Evidence(
            select_target,
            select_source,
            target,
            found,
            size=winner.size or 0,
            num_modules=len(select_kind(run.job.comparison.modules, str(winner.kind))),
            chosen_from=1 if primary else len(evaluation.plan.trials),
            arms=evaluation.arms,
            guards=guards,
            missing=missing,
        )
    )


def intervals(run: Run) -> Mapping[str, Any]:
    """95 % paired bootstrap intervals of the exported checkpoint on test: of the difference to the target, of TIR, of Recovery."""
    after, target, source = (run.scores(MAIN, "test", name) for name in (EXPORTED, ORIGIN.id, "source"))
    if after is None or target is None or source is None:
        return {}
    seed = run.job.recipe.task.split.seed
    found = {
        "difference": difference_interval(after, target=target, seed=seed),
        "recovery": recovery_interval(after, target=target, source=source, seed=seed),
    }
    if run.job.recipe.task.measures == "accuracy":
        found["tir"] = tir_interval(after, target=target, seed=seed)
    return {name: asdict(interval) for name, interval in found.items()}


def describe(verdict: Verdict, evaluation: Evaluation) -> dict[str, Any]:
    """For `summary.json`."""
    arms = evaluation.arms
    return {
        **asdict(verdict),
        "primary": evaluation.plan.primary,
        "arms": None if arms is None else {"sets_each": arms.sets_each, "scores_on_test": sorted(arms.scores, reverse=True)},
    }
