"""A driver that is ended in mid-sweep, rudely or politely: the same command again goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from integration.helpers import Place, Swept, run_main, timeless
from mlflow import MlflowClient

PATIENCE = 240


@contextmanager
def sweeping(place: Place, recipe: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process and a session of its own, which are gone after the block; what it says is in `said.txt`.

    It starts a Ray of its own, whatever others run on this machine.
    """
    with (place.path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "transplant_ray.cli", "sweep", str(recipe)],
            cwd=place.path, env={**os.environ, "RAY_ADDRESS": "local"}, start_new_session=True, stdout=said, stderr=said,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it ended by itself, and all that it had started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    path = folder / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def in_session(session: int) -> list[int]:
    """Processes of a session, Ray's too: none of them leaves it."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(swept: Swept, place: Place) -> None:
    recipe = place.recipe(name="killed", resources={"batch_size": 64})
    ledger = place.path / "runs" / ".ledger"
    with sweeping(place, recipe) as killed:
        wait_for(lambda: len(list(ledger.glob("*/*.parquet"))) >= 2, killed)
    assert not (place.path / "runs" / "killed" / "summary.json").exists(), "it was to be killed before its end"
    known = sum(len(pd.read_parquet(part)) for part in ledger.glob("*/*.parquet"))
    assert known

    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    again = Swept(place.path / "runs" / "killed", place, finished)
    assert again.summary["recalled"] >= known
    assert "taken from the ledger" in finished.out
    assert again.summary["test_opened"] == 1
    ours, theirs = timeless(again.results), timeless(swept.results)
    pd.testing.assert_frame_equal(ours.drop(columns=["loss", "kl"]), theirs.drop(columns=["loss", "kl"]))
    for name in ("loss", "kl"):  # measured again, in batches of another size
        assert ours[name].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-4, abs=1e-6, nan_ok=True)

    parts = [pd.read_parquet(part).assign(page=part.parent.name) for part in ledger.glob("*/*.parquet")]
    written = Counter(pd.concat(parts)[["page", "variant", "asked"]].itertuples(index=False))
    assert set(written.values()) == {1}


@pytest.mark.slow
def test_sigterm_ends_a_sweep_as_ctrl_c_does(cluster: None, place: Place) -> None:  # noqa: ARG001
    recipe = place.recipe(name="terminated", resources={"batch_size": 4, "shard_size": 5})
    folder = place.path / "runs" / "terminated"

    def answering() -> bool:
        return any(fact["event"] == "shard done" and "evaluator" in fact for fact in read_log(folder))

    with sweeping(place, recipe) as process:
        wait_for(answering, process)
        assert len(in_session(process.pid)) > 3, (place.path / "said.txt").read_text()
        process.terminate()
        assert process.wait(30) == 143, (place.path / "said.txt").read_text()
        said = (place.path / "said.txt").read_text()
        assert not in_session(process.pid), "it leaves nothing of its Ray behind"
    assert "stopped by SIGTERM; the same command goes on where it stopped" in said
    assert "Traceback" not in said

    log = read_log(folder)
    assert {"event": "sweep ends", "exit": 143, "error": "Terminated"}.items() <= log[-1].items()
    evaluated = [fact for fact in log if fact["event"] == "shard done" and "evaluator" in fact]
    assert not any(fact["event"] in ("winner", "evaluator died") for fact in log), "in mid-evaluation, and nobody died of it"
    (run,) = MlflowClient(place.uri).search_runs(["1"], "attributes.run_name = 'terminated'")
    assert run.info.status == "KILLED"

    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    again = Swept(folder, place, finished)
    assert again.summary["recalled"] >= sum(fact["examples"] for fact in evaluated), "all that was answered was kept"
    log = read_log(folder)
    assert len({fact["attempt"] for fact in log}) == 2
    assert log[-1]["exit"] == 0
