"""One workplace, one MLflow database, one Ray and one finished sweep for all integration tests: each of them costs seconds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import requests
from integration.helpers import (
    Finished,
    Head,
    Job,
    Place,
    Swept,
    free_port,
    make_source_overflow,
    related_pair,
    run_main,
    wait_until,
)
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))  # whichever test comes first pays for the sweep that many look at


@pytest.fixture(scope="session", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all tests here: MLflow puts artifacts into `./mlruns`, and the package caches under the home."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="session")
def empty_database(workplace: Path) -> Path:
    """An MLflow database with its tables and nothing in them: making one takes 9 seconds, a copy none."""
    path = workplace / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def template(workplace: Path, empty_database: Path) -> Place:
    database = shutil.copy(empty_database, workplace / "mlflow.db")
    place = Place(workplace / "template", f"sqlite:///{database}")
    place.path.mkdir()
    related_pair(place.path)
    return place


@pytest.fixture
def place(template: Place, tmp_path: Path) -> Place:
    """A copy of the pair and its task that a test may spoil."""
    return template.copy(tmp_path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray with two logical GPUs."""
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def swept(cluster: None, template: Place) -> Swept:  # noqa: ARG001
    """The tiny sweep, through the command line, into sqlite: on two GPUs, with two evaluators that share many units of work."""
    resources = {"gpus_per_model": 1, "evaluators": 2, "shard_size": 15}
    finished = run_main("sweep", template.recipe(resources=resources))
    assert finished.code == 0, finished.err
    return Swept(template.path / "runs" / "tiny", template, finished)


@pytest.fixture(scope="session")
def server(workplace: Path, empty_database: Path) -> Iterator[str]:
    """Address of a real MLflow server, user and password in it; the server asks for neither, but they are there to be leaked."""
    shutil.copy(empty_database, workplace / "server.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{workplace}/server.db", "--artifacts-destination", str(workplace / "artifacts")]
    with (workplace / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok, process)
        yield f"http://someone:open-sesame@127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its workers too: the session is its own
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for connections that nobody closes
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def served(cluster: None, template: Place, server: str, workplace: Path) -> Swept:  # noqa: ARG001
    """A sweep into the server, of a source that makes some variants overflow, over three rankers and two alphas.

    One sweep for three sets of promises, because every sweep starts eight processes that import torch or Tune.
    """
    place = template.copy(workplace / "served", uri=server)
    make_source_overflow(place.path)
    rank = {"by": ["lae", "random", "depth"], "trajectory": "source"}
    recipe = place.recipe(name="served", rank=rank, sweep={"k": [1, 3], "kind": ["ffn"], "alpha": [0.5, 1.0]})
    return Swept(place.path / "runs" / "served", place, run_main("sweep", recipe))


@pytest.fixture(scope="session")
def head(cluster: None) -> Iterator[Head]:  # noqa: ARG001  # `ray.init` chooses the mode of authentication for this process and its children
    """A Ray of its own for submitted jobs: one logical GPU, and a dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    port, dashboard = free_port(), free_port()
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--num-cpus=4", "--num-gpus=1", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: bool(JobSubmissionClient(f"http://127.0.0.1:{dashboard}")), process)
        yield Head(JobSubmissionClient(f"http://127.0.0.1:{dashboard}"), port)
    finally:
        process.terminate()  # it stops what it started
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def submitted(head: Head, swept: Swept, workplace: Path, empty_database: Path) -> tuple[Job, Swept]:
    """The recipe of `swept` again, as a job on one GPU with one evaluator, into a folder that holds its results already."""
    shared = workplace / "shared"
    shutil.copytree(swept.folder, shared / "runs" / "tiny")
    database = shutil.copy(empty_database, shared / "mlflow.db")
    place = Place(swept.place.path, f"sqlite:///{database}")
    overrides = [f"storage={shared}/runs", f"tracking.uri={place.uri}", "resources.evaluators=1"]
    job = head.run("sweep", place.path / "recipe.yaml", *overrides)
    return job, Swept(shared / "runs" / "tiny", place, Finished(job.code, job.log, job.log))
