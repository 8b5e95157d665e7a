"""Ray metrics of a run, which every node offers to Prometheus. docs/watching.md lists them.

They must never end a sweep, and none of them is worth an error: what goes wrong here is let go.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Event, Thread
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from transplant_ray.distributed.facts import (
    AtWork,
    EvaluatorDied,
    Fact,
    Paced,
    ShardDone,
    ShardRecalled,
    StageBegins,
    StageEnds,
    SweepBegins,
    SweepEnds,
    VariantDone,
    VariantsPlanned,
)
from transplant_ray.evaluate.answers import VariantShard

REFRESH_SECONDS = 5
"""Ray forgets a gauge that has not been set for twenty seconds."""
SECONDS = [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
ASKED = ("run", "task", "split")

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "examples": ("Examples that variants have answered", ASKED),
    "tokens": ("Tokens that variants have generated, or read where nothing is decoded", ASKED),
    "shards": ("Shards of examples that a variant has answered", ASKED),
    "recalled": ("Examples that were taken from the ledger instead", ASKED),
    "variants_done": ("Variants that have answered all of select, or were stopped or failed", ("run",)),
    "evaluator_deaths": ("Deaths of evaluators", ("run",)),
    "evaluator_examples": ("Examples answered, told by the evaluator that did it", ("run",)),
    "evaluator_tokens": ("Tokens of them", ("run",)),
    "evaluator_failures": ("Variants that failed, told by the evaluator", ("run",)),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "variants_planned": ("Variants of the plan, equal ones once", ("run",)),
    "evaluators": ("Evaluators that are there", ("run",)),
    "evaluators_at_work": ("Evaluators that have work in hand", ("run",)),
    "gpus_at_work": ("GPUs that those hold", ("run",)),
    "tokens_per_second": ("Tokens a second of all evaluators together, over the last minute", ("run",)),
    "seconds_left": ("Of the stage that is going on, at its pace so far", ("run",)),
    "stage": ("1 while the stage is going on, else 0", ("run", "stage")),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "shard_seconds": ("Seconds of computing that a variant's answers to a shard took", ASKED),
}


@cache
def _meter(name: str) -> Any:
    """One of each in a process: Ray wants them to be made once."""
    full = f"transplant_ray_{name}"
    if name in HISTOGRAMS:
        description, tags = HISTOGRAMS[name]
        return Histogram(full, description=description, boundaries=SECONDS, tag_keys=tags)
    kind, (description, tags) = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
    return kind(full, description=description, tag_keys=tags)


def _count(name: str, amount: float, **tags: str) -> None:
    if amount > 0:  # Ray refuses to count nothing
        _meter(name).inc(amount, tags)


class Meters:
    """What the driver knows: everything that came back, by task and split."""

    def __init__(self, run: str, alive: Callable[[], bool] = ray.is_initialized) -> None:
        self.run, self.alive = run, alive
        self.gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.ended = Event()

    def hear(self, fact: Fact) -> None:
        with suppress(Exception):
            if isinstance(fact, SweepBegins):
                Thread(target=self._refresh, name="meters", daemon=True).start()
            if isinstance(fact, SweepEnds):
                self.ended.set()
            if self.alive():
                self._hear(fact)

    def _refresh(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS):
            with suppress(Exception):
                for (name, tags), value in list(self.gauges.items()) if self.alive() else ():
                    _meter(name).set(value, dict(tags))

    def _hear(self, fact: Fact) -> None:
        match fact:
            case ShardRecalled():
                _count("recalled", fact.examples, run=self.run, task=fact.task, split=fact.split)
            case ShardDone():
                self._take(fact)
            case VariantDone():
                _count("variants_done", 1, run=self.run)
            case VariantsPlanned():
                self._set("variants_planned", len(fact.labels))
            case EvaluatorDied():
                _count("evaluator_deaths", 1, run=self.run)
            case AtWork():
                self._set("evaluators", fact.of)
                self._set("evaluators_at_work", fact.evaluators)
                self._set("gpus_at_work", fact.gpus)
            case StageBegins():
                self._set("stage", 1, stage=fact.stage)
            case Paced():
                self._set("tokens_per_second", fact.tokens_per_second or 0.0)
                if fact.seconds_left is not None:
                    self._set("seconds_left", fact.seconds_left)
            case StageEnds():
                self._set("stage", 0, stage=fact.stage)
                self._set("seconds_left", 0)

    def _take(self, shard: ShardDone) -> None:
        tags = {"run": self.run, "task": shard.task, "split": shard.split}
        for name, amount in (("examples", shard.examples), ("tokens", shard.tokens), ("shards", 1)):
            _count(name, amount, **tags)
        _meter("shard_seconds").observe(shard.seconds, tags)

    def _set(self, name: str, value: float, **tags: str) -> None:
        tags = {"run": self.run, **tags}
        self.gauges[name, tuple(tags.items())] = value
        _meter(name).set(value, tags)


def count_in_evaluator(run: str, shard: VariantShard) -> None:
    """In the evaluator's own process, so that Ray says of which node and worker it is."""
    with suppress(Exception):
        _count("evaluator_examples", len(shard.outcomes), run=run)
        _count("evaluator_tokens", sum(outcome.num_tokens for outcome in shard.outcomes), run=run)
        _count("evaluator_failures", shard.error is not None, run=run)
