"""What many GPUs would ask of the driver, by simulation: evaluators that only sleep, and trials that only report.

    python tests/bench/bench_scale.py [--evaluators 32] [--shards 10000] [--seconds 0.5] [--trials 1000]

The pool, its fleet, Ray and Tune are the real ones; a unit of work is a nap in a process of its own and gives back as much as
a shard of 128 examples. `busy` is the share of the evaluators' time that is nap, from the first unit to the last.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from transplant_ray.distributed.fleet import fleet
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.pool import Pool, Work
from transplant_ray.distributed.trials import Trials
from transplant_ray.evaluate.results import Result
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import Variant

EXAMPLES = 128


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


def shards(evaluators: int, number: int, seconds: float) -> None:
    came: list[float] = []
    memory: list[float] = []

    def take(_: object) -> None:
        came.append(time.perf_counter())
        if len(came) % max(1, number // 10) == 0:
            memory.append(rss())

    with fleet(lambda _: Sleeper.remote(), lambda _: evaluators, Overseer(), print) as gathered:  # type: ignore[attr-defined]
        while gathered.joining:
            gathered.welcome(ray.wait(list(gathered.joining), num_returns=1)[0][0])
        pool = Pool(gathered, rows=1)
        begun, cpu = time.perf_counter(), cpu_seconds()
        pool.run((Work((Nap(str(i), seconds),), (), None) for i in range(number)), take)  # type: ignore[arg-type]
    wall = came[-1] - begun
    print(f"{number} shards of {seconds} s on {evaluators} evaluators: {wall:.1f} s")
    print(f"busy: {number * seconds / (evaluators * wall):.1%}")
    tenths = " ".join(f"{mebibytes:.0f}" for mebibytes in memory)
    print(f"driver: {1000 * (cpu_seconds() - cpu) / number:.2f} ms of CPU a shard; MiB by tenths: {tenths}")


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
    if arguments.shards:
        shards(arguments.evaluators, arguments.shards, arguments.seconds)
    if arguments.trials:
        trials(arguments.trials)
    ray.shutdown()


if __name__ == "__main__":
    main()
