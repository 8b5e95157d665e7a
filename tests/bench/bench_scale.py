"""What many GPUs would ask of the driver, by simulation: evaluators that only sleep, and trials that only report.

    python tests/bench/bench_scale.py [--evaluators 32] [--shards 10000] [--seconds 0.5] [--trials 1000]

The pool, its fleet, Ray and Tune are the real ones; a unit of work is a nap in a process of its own and gives back as much as
a shard of 128 examples. What comes back goes where a sweep's goes: into the ledger (on disk here), the spool, the tallies, the log
and the metrics. `busy` is the share of the evaluators' time that is nap, from first to last; below 90 % the script ends with 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from transplant_ray.distributed.facts import of_shard
from transplant_ray.distributed.fleet import fleet
from transplant_ray.distributed.meters import Meters
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.pool import Pool, Work
from transplant_ray.distributed.trials import Trials
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.results import Result
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.journal import Journal
from transplant_ray.recipe import Recipe
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder

EXAMPLES = 128
BAR = 0.9
"""Of the evaluators' time that is to be nap."""
RECIPE = {
    "name": "scale",
    "source": {"model": "zoo:cross-generation/source"},
    "target": {"model": "zoo:cross-generation/target"},
    "task": {"data": "none.jsonl", "prompt": "{prompt}", "answer": "{answer}", "max_new_tokens": 8},
    "sweep": {"k": [1]},
}


@dataclass(frozen=True)
class Nap:
    """Stands for a variant, so that processes that sleep need not import torch."""

    id: str
    seconds: float


@dataclass(frozen=True)
class Slept:
    """Stands for a shard."""

    variant: str
    outcomes: tuple[tuple[str, str, str, bool, int, bool], ...]
    error: str | None = None


@ray.remote(num_cpus=0)
class Sleeper:
    def join(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def evaluate(self, naps: Sequence[Nap], *_: Any) -> Iterator[Slept]:
        for nap in naps:
            time.sleep(nap.seconds)
            yield Slept(nap.id, tuple((nap.id, f"{i:032x}", "a completion of some words", True, 40, True) for i in range(EXAMPLES)))


def rss() -> float:
    """MiB of this process."""
    return psutil.Process().memory_info().rss / 2**20


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Desk:
    """What a sweep does with a shard that comes back, without a sweep."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.answers = Ledger(Shelf(str(folder / "ledger")), print), Answers()
        self.examples = [Rendered(f"{i:032x}", (1, 2, i), (3,), "x") for i in range(EXAMPLES)]
        self.journal, self.meters = Journal(Recipe.model_validate(RECIPE)), Meters("scale")
        self.run = RunFolder.of(str(folder), "scale")

    @contextmanager
    def open(self) -> Iterator[None]:
        self.run.claim("scale", "name: scale\n")
        with self.journal.kept(self.run, "scale"):
            yield
        self.ledger.write()

    def take(self, slept: Slept) -> None:
        outcomes = tuple(Outcome(*outcome) for outcome in slept.outcomes)
        shard = VariantShard(slept.variant, outcomes, 0.5, evaluator="e", node="n")
        self.ledger.keep("page", shard, self.examples)
        self.answers.add("select", shard)
        for listener in (self.journal, self.meters):
            listener.hear(of_shard("task", "select", shard))


def shards(evaluators: int, number: int, seconds: float) -> float:
    """The share of the evaluators' time that was nap."""
    came: list[float] = []
    memory: list[float] = [rss()]
    at_desk = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(lambda _: Sleeper.remote(), lambda _: evaluators, Overseer(), print) as gathered,  # type: ignore[attr-defined]
        (desk := Desk(Path(folder))).open(),
    ):

        def take(slept: Slept) -> None:
            nonlocal at_desk
            came.append(time.perf_counter())
            began = cpu_seconds()
            desk.take(slept)
            at_desk += cpu_seconds() - began
            if len(came) % max(1, number // 10) == 0:
                memory.append(rss())

        while gathered.joining:
            gathered.welcome(ray.wait(list(gathered.joining), num_returns=1)[0][0])
        pool = Pool(gathered, rows=1)
        begun, cpu = time.perf_counter(), cpu_seconds()
        pool.run((Work((Nap(str(i), seconds),), (), None) for i in range(number)), take)  # type: ignore[arg-type]
        spent = cpu_seconds() - cpu
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    wall = came[-1] - begun
    busy = number * seconds / (evaluators * wall)
    print(f"{number} shards of {seconds} s on {evaluators} evaluators: {wall:.1f} s")
    print(f"busy: {busy:.1%}")
    print(
        f"driver: {1000 * spent / number:.2f} ms of CPU a shard, {1000 * at_desk / number:.2f} of it for ledger, spool, log, "
        f"metrics; MiB by tenths: {' '.join(f'{mebibytes:.0f}' for mebibytes in memory)}"
    )
    grown = (memory[-1] - memory[0]) * 2**20 / (number * EXAMPLES)
    print(f"{number * EXAMPLES:,} outcomes: {grown:.0f} bytes of memory each, {stored / (number * EXAMPLES):.0f} in the ledger")
    return busy


def trials(number: int) -> None:
    """All results are there when Tune starts: what is left is Tune's own time, and ours."""
    planned = [Planned("trial", Variant({f"m{i}": 1.0}), "lae", "all", i + 1, 1.0) for i in range(number)]
    waiting = Trials(planned)
    for entry in planned:
        row = Result(
            variant=entry.id, role="trial", ranker="lae", kind="all", k=entry.k, alpha=1.0, seed=None, split="select", n=100,
            correct=50, accuracy=0.5, ci_low=0.4, ci_high=0.6, tir=None, recovery=None, num_modules=1, num_parameters=1,
            seconds=1.0, winner=False, error=None,
        )  # fmt: skip
        waiting.post(row, last=True)
    told: list[str] = []
    before, begun, cpu = rss(), time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        waiting.run(Path(folder) / "tune", lambda result: told.append(result.label))
    wall = time.perf_counter() - begun
    print(f"{number} trials through Tune: {wall:.1f} s, {1000 * wall / number:.0f} ms a trial; {len(set(told))} reported")
    print(f"driver: {1000 * (cpu_seconds() - cpu) / number:.0f} ms of CPU a trial; {before:.0f} MiB before, {rss():.0f} MiB after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluators", type=int, default=32)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=1_000)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"{os.cpu_count()} CPU cores, ray {ray.__version__}, load {os.getloadavg()[0]:.1f}")
    busy = shards(arguments.evaluators, arguments.shards, arguments.seconds) if arguments.shards else 1.0
    if arguments.trials:
        trials(arguments.trials)
    ray.shutdown()
    if busy < BAR:
        raise SystemExit(f"busy {busy:.1%} of the time, the bar is {BAR:.0%}")


if __name__ == "__main__":
    main()
