"""The sweep as Ray Tune sees it: a trial is one point of the grid, and all of them wait for the evaluator pool."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transplant_ray.distributed.mailbox import Mailbox, run_trial
from transplant_ray.evaluate.results import Result
from transplant_ray.graft.plan import Planned

MAX_CONCURRENT_TRIALS = 1
"""Trials only wait, so one process serves any number of them. With two, Tune starts a process for the next before it sees that
one is free, and throws it away: five times the time (docs/LOG.md)."""

TRIAL_RESOURCES = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
"""No CPU: a trial that wants a share of one waits for ever where the evaluators hold all. The head has this resource in plenty."""

OnTrial = Callable[[Result], None]


class Trials:
    """The grid points of a sweep. `post` gives a trial a result, from any thread; `run` returns when all have had their last."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self.planned = planned
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # where it dies with us alone
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined] # what the decorator adds

    def post(self, result: Result, *, last: bool) -> None:
        self.mailbox.post.remote(result.label, {"result": asdict(result), "n": result.n, "score": result.score, "last": last})

    def fail(self, reason: str) -> None:
        self.mailbox.fail.remote(reason)

    def run(self, folder: Path, on_trial: OnTrial) -> None:
        """`on_trial` is called here, with the reported result, as each trial ends. `folder` takes Tune's own state."""
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(MAX_CONCURRENT_TRIALS))
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has the metrics
        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep, not only the trials
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output ignores verbose=0
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a traceback for each process that dies; we say what became of it
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, mailbox=self.mailbox), TRIAL_RESOURCES),
            param_space={"point": tune.grid_search([_point(planned) for planned in self.planned])},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=MAX_CONCURRENT_TRIALS),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent.resolve()),
                verbose=0,
                callbacks=[_TrialCallback(on_trial)],
                failure_config=tune.FailureConfig(max_failures=2),
            ),
        )
        tuner.fit()


class _TrialCallback(Callback):
    """Runs on the driver, where the tracking is."""

    def __init__(self, on_trial: OnTrial) -> None:
        self.on_trial = on_trial

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks so that a sweep could be restored by it; ours never is, and what it calls cannot be pickled."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        reported = trial.last_result or {}
        if reported.get("last"):  # a trial that died before its last word has reported nothing, and its row says so
            self.on_trial(Result(**reported["result"]))


def _point(planned: Planned) -> dict[str, Any]:
    """A grid point as Tune shows it. Clipped values of K make the grid less than a full product, so points are listed."""
    return {
        "label": planned.label,
        "ranker": planned.ranker,
        "kind": planned.kind,
        "k": planned.k,
        "alpha": planned.alpha,
        "channels": planned.channels,
        "penalty": planned.penalty,
    }
