"""Whoever is killed, by SIGKILL and at a random point, the results are those of the calm run, and nothing known is asked again.

`make chaos` takes all seeds, `.ci/run` the first three.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from chaos.conftest import Scene, recipe_for
from chaos.machines import Machines, Sweep, sweep, until
from integration.helpers import read_results, timeless

SEEDS = 21
MEASURED_AGAIN = ("kl", "loss")
"""Numbers that are read in batches of whoever is there: equal up to rounding."""
TRIES = 3


def strike(machines: Machines, title: str, role: str | None, running: Sweep, delay: float) -> bool:
    """Kill one such process, a while after it appeared, or the next where it was gone by then; false where there is none."""
    while until(lambda: machines.workers(title, role), running):
        time.sleep(delay)
        with suppress(psutil.NoSuchProcess):
            for process in machines.workers(title, role)[:1]:
                process.send_signal(signal.SIGKILL)
                return True
    return False


def strike_node(machines: Machines, running: Sweep, delay: float, dice: random.Random) -> bool:
    """A node goes while models are on it; another of its kind comes."""
    role = dice.choice(["source", "target"])
    if not until(lambda: machines.workers("ModelActor") or machines.workers("Evaluator"), running):
        return False
    time.sleep(delay)
    machines.kill(role)
    time.sleep(dice.uniform(0, 3))
    machines.add(role)
    return True


@dataclass(frozen=True)
class Victim:
    kill: Callable[[Machines, Sweep, float, random.Random], bool]
    longest: float
    """Seconds that it lives, about: it is killed at a random one of them."""


VICTIMS = {
    "source actor": Victim(lambda machines, running, delay, _: strike(machines, "ModelActor", "source", running, delay), 0.8),
    "evaluator": Victim(lambda machines, running, delay, _: strike(machines, "Evaluator", None, running, delay), 15),
    "driver": Victim(lambda machines, running, delay, _: strike_driver(running, delay, machines), 25),
    "target actor": Victim(lambda machines, running, delay, _: strike(machines, "ModelActor", "target", running, delay), 0.8),
    "ranking task": Victim(lambda machines, running, delay, _: strike(machines, "RankingActor", None, running, delay), 5),
    "node": Victim(strike_node, 15),
    "trial": Victim(lambda machines, running, delay, _: strike(machines, "ImplicitFunc", None, running, delay), 1),
}


def strike_driver(running: Sweep, delay: float, machines: Machines) -> bool:
    if not until(lambda: machines.workers("ModelActor") or machines.workers("Evaluator"), running):
        return False
    time.sleep(delay)
    if running.process.poll() is not None:
        return False
    running.kill()
    return True


@pytest.mark.timeout(2500)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[] if seed < 3 else pytest.mark.slow) for seed in range(SEEDS)])
def test_the_results_are_those_of_the_calm_run(scene: Scene, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    name, victim = list(VICTIMS.items())[seed % len(VICTIMS)]
    for number in range(TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipe = recipe_for(scene.place(folder), scene.machines.address)
        with sweep(recipe) as running:
            struck = victim.kill(scene.machines, running, dice.uniform(0, victim.longest) / (number + 1), dice)
            if name == "driver":  # one that has written its summary was not killed in its work
                struck = struck and not summary_of(folder).exists()
            else:
                assert running.wait() == 0, running.said
        if struck:
            break
    assert struck, f"{TRIES} times the {name} was gone before it could be killed"
    known = ledger(folder)
    if name == "driver":
        with sweep(recipe) as running:
            assert running.wait() == 0, running.said
        summary = json.loads(summary_of(folder).read_text())
        assert summary["recalled"] >= sum(known.values())
        known = ledger(folder)
    assert set(known.values()) == {1}, "the ledger has an outcome twice"
    assert set(shards_done(folder).values()) == {1}, "a shard of a variant came twice in one attempt"
    same(read_results(folder / "runs" / "chaos"), scene.calm)


def summary_of(folder: Path) -> Path:
    return folder / "runs" / "chaos" / "summary.json"


def same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    ours, theirs = timeless(ours), timeless(theirs)
    pd.testing.assert_frame_equal(ours.drop(columns=[*MEASURED_AGAIN]), theirs.drop(columns=[*MEASURED_AGAIN]))
    for name in MEASURED_AGAIN:
        assert ours[name].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-4, abs=1e-6, nan_ok=True)


def shards_done(folder: Path) -> Counter[Any]:
    """How often evaluators gave the answers of a variant to a shard, in each attempt."""
    lines = map(json.loads, (folder / "runs" / "chaos" / "log.jsonl").read_text().splitlines())
    done = [line for line in lines if line["event"] == "shard done" and line.get("evaluator")]
    return Counter((line["attempt"], line["task"], line["split"], line["variant"], line["shard"]) for line in done)


def ledger(folder: Path) -> Counter[Any]:
    parts = [pd.read_parquet(part).assign(page=part.parent.name) for part in (folder / "runs" / ".ledger").glob("*/*.parquet")]
    if not parts:
        return Counter()
    return Counter(pd.concat(parts)[["page", "variant", "asked"]].itertuples(index=False, name=None))
