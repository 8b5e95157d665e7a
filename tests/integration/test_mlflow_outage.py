"""An MLflow server that is killed in mid-sweep and started again, or not; and one of which every answer is lost once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from integration.helpers import Place, Swept, folder_bytes, free_port, run_main, wait_until
from matplotlib.image import imread
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from runs import Made, write_run

from transplant_ray import load_recipe, show
from transplant_ray.report.figures import tracking_figures
from transplant_ray.tracking.tracker import Tracker

SECRET = "open-sesame"
OUTAGE_SECONDS = 30
ARTIFACTS = {
    "recipe.yaml", "environment.json", "rankings.parquet", "results.parquet", "guards.parquet", "summary.json", "report.html",
    "variants.csv", "variants.tex", "figures/k_curves.png", "figures/scores_lae.png",
}  # fmt: skip


@dataclass
class Server:
    """A real server that can be killed and started again on its port."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    killed_at: float = 0.0
    started_at: float = 0.0

    @property
    def uri(self) -> str:
        return f"http://someone:{SECRET}@127.0.0.1:{self.port}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, self.uri)

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.started_at = time.time()
        wait_until(lambda: requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok, self.process)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its workers too: the session is its own
            self.process.wait()
            self.process, self.killed_at = None, time.time()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    folder = tmp_path_factory.mktemp("outage")
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture
def mortal(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def spot(template: Place, folder: Path) -> Place:
    """Shared by the sweeps here, so that the later ones find what the first has evaluated."""
    (folder / "pair").mkdir()
    return template.copy(folder / "pair")


def kill_after_the_first_trial(server: Server, patch: pytest.MonkeyPatch) -> None:
    log_trial = Tracker.log_trial

    def log_and_kill(self: Tracker, *args: Any) -> Future[str]:
        child = log_trial(self, *args)
        if server.killed_at == 0:
            child.result(120)
            server.kill()
        return child

    patch.setattr(Tracker, "log_trial", log_and_kill)


def start_again_when_awaited(server: Server, patch: pytest.MonkeyPatch) -> threading.Thread:
    """After half a minute, and not before the sweep has nothing else to do."""
    awaited, drain = threading.Event(), Tracker.drain

    def announce_and_drain(self: Tracker) -> None:
        awaited.set()
        drain(self)

    def start_again() -> None:
        awaited.wait(600)
        time.sleep(max(0.0, server.killed_at + OUTAGE_SECONDS - time.time()))
        server.start()

    patch.setattr(Tracker, "drain", announce_and_drain)
    thread = threading.Thread(target=start_again, daemon=True)
    thread.start()
    return thread


def children(client: MlflowClient, parent: Run) -> list[Run]:
    return list(client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"))


def artifacts(client: MlflowClient, run: str, under: str = "") -> set[str]:
    listed = client.list_artifacts(run, under)
    return {path for entry in listed for path in (artifacts(client, run, entry.path) if entry.is_dir else {entry.path})}


def check_that_mlflow_has_everything(client: MlflowClient, swept: Swept, tmp_path: Path) -> list[Run]:
    """Every trial once with its numbers, every artifact, the winner as one model version; returns the trials' runs."""
    parent = client.get_run(swept.summary["mlflow_run"])
    assert parent.info.status == "FINISHED"
    assert artifacts(client, parent.info.run_id) == ARTIFACTS
    for name in ("results.parquet", "report.html", "summary.json"):
        path = Path(client.download_artifacts(parent.info.run_id, name, str(tmp_path)))
        assert path.read_bytes() == (swept.folder / name).read_bytes(), name
    for name in [name for name in ARTIFACTS if name.endswith(".png")]:
        assert imread(client.download_artifacts(parent.info.run_id, name, str(tmp_path))).std() > 0, f"{name} shows nothing"
    results = swept.results
    for split, role in (("select", "target"), ("test", "all")):
        assert parent.data.metrics[f"{split}_{role}"] == results.query("split == @split and role == @role")["accuracy"].item()

    runs = children(client, parent)
    trials = [row for row in show(swept.folder)[0] if row.role == "trial" and row.split == "select"]
    assert Counter(run.info.run_name for run in runs) == Counter(row.label for row in trials)
    by_name = {run.info.run_name: run for run in runs}
    for row in trials:
        run = by_name[row.label]
        assert run.info.status == "FINISHED"
        assert run.data.params["variant"] == row.variant
        numbers = {name: getattr(row, name) for name in ("accuracy", "ci_low", "recovery", "n", "loss", "kl", "moved")}
        assert numbers.items() <= run.data.metrics.items()
        assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 1
        assert "variant.json" in artifacts(client, run.info.run_id)

    (winner,) = [run for run in runs if run.data.tags.get("winner") == "true"]
    assert winner.data.metrics["test_accuracy"] == results.query("split == 'test' and winner")["accuracy"].item()
    for part in ("checkpoint", "delta"):
        downloaded = Path(client.download_artifacts(winner.info.run_id, part, str(tmp_path)))
        assert folder_bytes(downloaded) == folder_bytes(swept.folder / part)
    (version,) = client.search_model_versions(f"run_id = '{winner.info.run_id}'")
    assert swept.summary["model_version"] == f"{version.name}/{version.version}"
    return runs


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_sweep_has_everything_in_the_end(
    mortal: Server, spot: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kill_after_the_first_trial(mortal, monkeypatch)
    restart = start_again_when_awaited(mortal, monkeypatch)
    finished = run_main("sweep", spot.recipe(name="interrupted", tracking={"uri": mortal.uri}))
    restart.join(120)
    assert finished.code == 0, finished.err
    assert mortal.started_at - mortal.killed_at >= OUTAGE_SECONDS
    swept = Swept(spot.path / "runs" / "interrupted", spot, finished)
    runs = check_that_mlflow_has_everything(mortal.client, swept, tmp_path)

    said = " ".join(finished.out.split())
    assert said.count("MLflow does not answer (") == said.count("MLflow answers again; ") == 1
    assert "entries wait, up to 600 s" in said
    assert SECRET not in finished.out + finished.err
    assert swept.summary["mlflow_refused"] == []
    for run in runs:  # measured in the outage, and sent after it
        (measured,) = mortal.client.get_metric_history(run.info.run_id, "accuracy")
        assert measured.timestamp < mortal.started_at * 1000
        assert run.info.end_time < mortal.started_at * 1000


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_server_that_stays_away_is_said_and_the_same_recipe_again_has_everything(
    mortal: Server, spot: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = spot.recipe(name="abandoned", tracking={"uri": mortal.uri, "patience": 1})
    with monkeypatch.context() as patch:
        kill_after_the_first_trial(mortal, patch)
        finished = run_main("sweep", recipe)
    assert finished.code == 2
    assert f"TrackingError: `tracking.uri` http://127.0.0.1:{mortal.port}: does not answer" in finished.err
    assert "start the server and run the same recipe again" in finished.err
    assert SECRET not in finished.out + finished.err
    run = spot.path / "runs" / "abandoned"
    for name in ("results.parquet", "summary.json", "report.html", "variants.csv", "checkpoint/model.safetensors"):
        assert (run / name).stat().st_size, name
    before = show(run)[0]
    assert any(row.winner and row.split == "test" for row in before)

    mortal.start()
    again = run_main("sweep", recipe)
    assert again.code == 0, again.err
    swept = Swept(run, spot, again)
    check_that_mlflow_has_everything(mortal.client, swept, tmp_path)
    assert [(row.variant, row.split, row.accuracy) for row in show(run)[0]] == [(r.variant, r.split, r.accuracy) for r in before]


class Forgetful:
    """A client whose every call does what it should, and the first time that it is made with these words, nobody hears of it."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.lost: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.client, name)(*args, **kwargs)
            known = [Path(word).name if isinstance(word, str) else word for word in args]  # a figure is in another folder each time
            words = f"{name} {known} {sorted(kwargs)}"
            if words not in self.lost:
                self.lost.add(words)
                raise MlflowException("API request failed with exception: connection reset by peer")
            return answer

        return call


@pytest.mark.timeout(120)
def test_nothing_is_there_twice_where_every_answer_is_lost_once(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transplant_ray.tracking.outbox.FIRST_PAUSE", 0.01)
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'forgetful.db')}"
    run = write_run(tmp_path / "made", Made(rankers=("lae",), ks=(1, 2), penalties=(), num_layers=2, num_examples=20))
    for place in (run.checkpoint, run.delta):
        place.mkdir(exist_ok=True)
        (place / "model.safetensors").write_bytes(b"weights")
    rows = show(run.path)[0]
    trials = [row for row in rows if row.role == "trial" and row.split == "select"]
    (winner,) = [row for row in rows if row.winner and row.split == "test"]

    tracker = Tracker.start(load_recipe(run.path / "recipe.yaml", [f"tracking.uri={uri}"]))
    client, tracker.client = tracker.client, Forgetful(tracker.client)
    runs = {row.label: tracker.log_trial(row, {"label": row.label}) for row in trials}
    tracker.log_summary(run, {"test_winner": winner.accuracy}, tracking_figures(run), None)
    version = tracker.log_winner(runs[winner.label], winner, run)
    tracker.log_files(run.summary)
    tracker.finish()

    assert tracker.refused == ()
    assert len(tracker.client.lost) > 5 * len(trials)
    parent = client.get_run(tracker.run_id)
    assert parent.info.status == "FINISHED"
    found = {child.info.run_name: child for child in children(client, parent)}
    assert Counter(child.info.run_name for child in children(client, parent)) == Counter(row.label for row in trials)
    for row in trials:
        history = client.get_metric_history(found[row.label].info.run_id, "accuracy")
        assert [metric.value for metric in history] == [row.accuracy]
    (one,) = client.search_model_versions(f"name = '{tracker.recipe.name}'")
    assert version.result() == f"{one.name}/{one.version}"
    assert one.run_id == runs[winner.label].result()
