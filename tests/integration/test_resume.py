"""A driver that is killed in mid-sweep: the same command again goes on where it was, and ends with a calm run's numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
from integration.helpers import Place, Swept, run_main, timeless

PATIENCE = 240


def test_a_killed_driver_goes_on_where_it_was(swept: Swept, place: Place) -> None:
    recipe = place.recipe(name="killed", resources={"batch_size": 64})
    ledger = place.path / "runs" / ".ledger"
    killed = subprocess.Popen(
        [sys.executable, "-m", "transplant_ray.cli", "sweep", str(recipe)],
        cwd=place.path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(ledger.glob("*/*.parquet"))) < 2 and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
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
