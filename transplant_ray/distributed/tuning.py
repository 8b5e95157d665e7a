"""Ray Tune as all of ours use it: a grid, silent, with signals left to us, and state in a folder that nobody reads again."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

from ray import tune
from ray.tune import Callback


class Listener(Callback):
    """Runs where Tune does, and hands on what it hears.

    Tune saves its callbacks so that a grid could be restored by it. Ours never is, and what a listener tells cannot be pickled.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _WhenSet(tune.Stopper):
    """Ends a grid from outside."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self.event.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as with a `Listener`


def make_tuner(
    trainable: Any,
    resources: tune.PlacementGroupFactory,
    grid: tuple[str, Sequence[Any]],
    listener: Listener,
    folder: Path,
    *,
    at_once: int,
    starting: int,
    max_failures: int,
    checkpoints: tune.CheckpointConfig | None = None,
    stop: Event,
) -> tune.Tuner:
    """A trial for each value of the grid's one key, at most `at_once` of them, in processes that serve one after another.

    `starting` is how many processes may be on their way; `max_failures` how often one may die under a trial. `folder` takes Tune's
    own state. Once `stop` is set the grid ends, whatever it is at.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(starting)  # for a grid Tune starts a process for every trial otherwise
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has the metrics
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends all of it, not only the trials
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output ignores verbose=0
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a traceback for each process that dies; we say what became of it
    key, values = grid
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={key: tune.grid_search(list(values))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent.resolve()),
            verbose=0,
            callbacks=[listener],
            stop=_WhenSet(stop),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=checkpoints or tune.CheckpointConfig(),
        ),
    )
