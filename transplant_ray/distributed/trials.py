"""The sweep as Ray Tune sees it: a trial is one point of the grid, and all of them wait for the evaluator pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

from ray import tune

from transplant_ray.distributed.cluster import beside_the_driver
from transplant_ray.distributed.mailbox import Mailbox, run_trial
from transplant_ray.distributed.tuning import Listener, make_tuner
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
        self.failed = Event()
        """Set once nothing more will come: each trial would be told so three times, in processes of their own."""
        self.mailbox = Mailbox.options(scheduling_strategy=beside_the_driver()).remote()  # type: ignore[attr-defined] # what the decorator adds

    def post(self, result: Result, *, last: bool) -> None:
        self.mailbox.post.remote(result.label, {"result": asdict(result), "n": result.n, "score": result.score, "last": last})

    def fail(self, reason: str) -> None:
        self.failed.set()
        self.mailbox.fail.remote(reason)

    def run(self, folder: Path, on_trial: OnTrial) -> None:
        """`on_trial` is called here, with the reported result, as each trial ends. `folder` takes Tune's own state."""
        tuner = make_tuner(
            tune.with_parameters(run_trial, mailbox=self.mailbox),
            TRIAL_RESOURCES,
            ("point", [_point(planned) for planned in self.planned]),
            _TrialListener(on_trial),
            folder,
            at_once=MAX_CONCURRENT_TRIALS,
            starting=MAX_CONCURRENT_TRIALS,
            max_failures=2,
            stop=self.failed,
        )
        tuner.fit()


class _TrialListener(Listener):
    """Runs on the driver, where the tracking is."""

    def __init__(self, on_trial: OnTrial) -> None:
        self.on_trial = on_trial

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
