"""The server of deploy/compose.yaml with its own flags, a real PostgreSQL, an S3 interface; and our tracker on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
import requests
import yaml
from integration.helpers import REPOSITORY, folder_bytes, free_port, wait_until
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from PIL import Image
from runs import Made, write_run

from transplant_ray import load_recipe, show
from transplant_ray.report.figures import tracking_figures
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.tracker import Tracker

SERVICES = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]
PASSWORD = "open-sesame"
BUCKET = SERVICES["s3"]["environment"]["S3_BUCKET"]


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs: Debian keeps them off the PATH, by version."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]
    return Path(found[0]).parent if found else None


PROGRAMS = find_programs()
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL here (Debian's package `postgresql` has it)")


@dataclass(frozen=True)
class Deployed:
    """A running server, and how to look behind it."""

    uri: str
    database: str
    store: Any
    log: Path

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg2.connect(self.database, password=PASSWORD) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()

    def objects(self, under: str) -> set[str]:
        pages = self.store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=under)
        return {entry["Key"].removeprefix(under) for page in pages for entry in page.get("Contents", ())}


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Address of a database that asks for a password, in a cluster of its own."""
    assert PROGRAMS is not None
    person: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.getuid() == 0 else {}  # PostgreSQL refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    (folder / "password").write_text(PASSWORD)
    if person:
        for path in (folder, folder / "password"):
            shutil.chown(path, person["user"])
    port, data = free_port(), folder / "data"
    access = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={folder}/password"]
    subprocess.run(
        [PROGRAMS / "initdb", f"--pgdata={data}", *access, "--no-sync"], check=True, capture_output=True, cwd="/", **person
    )
    command = [
        PROGRAMS / "postgres",
        "-D",
        data,
        "-p",
        str(port),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        f"unix_socket_directories={folder}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **person)
    try:
        ask = [PROGRAMS / "pg_isready", "--host=127.0.0.1", f"--port={port}"]
        wait_until(lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, process)
        admin = psycopg2.connect(f"postgresql://mlflow@127.0.0.1:{port}/postgres", password=PASSWORD)
        admin.autocommit = True
        admin.cursor().execute("CREATE DATABASE mlflow")
        admin.close()
        yield f"postgresql://mlflow@127.0.0.1:{port}/mlflow"
    finally:
        process.send_signal(signal.SIGINT)  # to PostgreSQL: end now, without waiting for those who are connected
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Address of an S3 interface with the bucket of the Compose file."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _client(f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"http://{host}:{port}"
    server.stop()


def _client(address: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key=PASSWORD
    )


@pytest.fixture(scope="module")
def deployed(workplace: Path, database: str, store: str) -> Iterator[Deployed]:
    """`mlflow server` as the Compose file starts it; only its addresses and ports are those of this test."""
    port, log = free_port(), workplace / "deployed.log"
    replaced = {"//mlflow@postgres:5432/mlflow": database.partition(":")[2], "0.0.0.0": "127.0.0.1", "5000": str(port)}
    replaced["--workers=2"] = "--workers=1"  # on a busy machine uvicorn ends workers that start slowly
    words = SERVICES["mlflow"]["command"]
    for old, new in replaced.items():
        words = [word.replace(old, new) for word in words]
    environment = {**SERVICES["mlflow"]["environment"], "MLFLOW_S3_ENDPOINT_URL": store, "AWS_ACCESS_KEY_ID": "key"}
    environment |= {"PGPASSWORD": PASSWORD, "AWS_SECRET_ACCESS_KEY": PASSWORD}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | environment,
        )
    try:
        wait_until(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok, process, 300)  # it makes its tables first
        yield Deployed(f"http://127.0.0.1:{port}", database, _client(store), log)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself, which `wait_until` has said
            os.killpg(process.pid, signal.SIGTERM)  # its workers too: the session is its own
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Logged:
    folder: RunFolder
    client: MlflowClient
    parent: str
    winner: str
    version: str | None


@pytest.fixture(scope="module")
def logged(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A run folder of a few variants, told to the server as a sweep tells it."""
    made = Made(rankers=("lae",), ks=(1, 2), penalties=(), num_layers=2, num_examples=20, guards=("facts",))
    folder = write_run(tmp_path_factory.mktemp("made") / "small", made)
    for place in (folder.checkpoint, folder.delta):
        place.mkdir(exist_ok=True)
        (place / "model.safetensors").write_bytes(os.urandom(200_000))
    overrides = [f"tracking.uri={deployed.uri}", "tracking.upload=checkpoint"]
    tracker = Tracker.start(load_recipe(folder.path / "recipe.yaml", overrides))
    rows = show(folder.path)[0]
    runs = {
        row.label: tracker.log_trial(row, {"label": row.label}) for row in rows if row.role == "trial" and row.split == "select"
    }
    (winner,) = [row for row in rows if row.winner and row.split == "test"]
    tracker.log_summary(folder, {"test_winner": winner.accuracy}, tracking_figures(folder), None)
    tracker.log_files(folder.summary)
    version = tracker.log_winner(runs[winner.label], winner, folder)
    tracker.finish()
    return Logged(folder, tracker.client, tracker.run_id, runs[winner.label].result(), version.result())


def test_runs_and_their_numbers_are_in_postgresql(deployed: Deployed, logged: Logged) -> None:
    results = {row.label: row for row in show(logged.folder.path)[0] if row.role == "trial" and row.split == "select"}
    runs = deployed.query("SELECT name, run_uuid, status FROM runs")
    assert {name for name, run, _ in runs if run != logged.parent} == results.keys()
    assert {status for _, _, status in runs} == {"FINISHED"}
    stored = {(run, key): value for run, key, value in deployed.query("SELECT run_uuid, key, value FROM latest_metrics")}
    for name, run, _ in runs:
        if run != logged.parent:
            assert stored[run, "accuracy"] == results[name].accuracy
            assert logged.client.get_run(run).data.metrics["accuracy"] == results[name].accuracy
    assert logged.client.get_run(logged.parent).info.status == "FINISHED"


def test_tables_and_figures_are_in_the_store_and_come_back(deployed: Deployed, logged: Logged, tmp_path: Path) -> None:
    where = logged.client.get_run(logged.parent).info.artifact_uri.removeprefix("mlflow-artifacts:/") + "/"
    tables = {"results.parquet", "rankings.parquet", "guards.parquet", "summary.json", "recipe.yaml", "environment.json"}
    figures = {"figures/k_curves.png", "figures/scores_lae.png"}
    assert deployed.objects(where) == tables | figures
    for name in ("results.parquet", "rankings.parquet"):
        path = Path(logged.client.download_artifacts(logged.parent, name, str(tmp_path)))
        assert path.read_bytes() == (logged.folder.path / name).read_bytes()
    for name in figures:
        with Image.open(logged.client.download_artifacts(logged.parent, name, str(tmp_path))) as image:
            image.load()
            assert len(image.getcolors(1 << 24)) > 10, f"{name} is blank"


def test_the_winners_checkpoint_is_a_registered_version_and_comes_back(logged: Logged, tmp_path: Path) -> None:
    name = load_recipe(logged.folder.path / "recipe.yaml").name
    version = logged.client.get_model_version_by_alias(name, "winner")
    assert logged.version == f"{name}/{version.version}"
    assert version.run_id == logged.winner
    path = logged.client.download_artifacts(logged.winner, "checkpoint", str(tmp_path))
    assert folder_bytes(Path(path)) == folder_bytes(logged.folder.checkpoint)


def test_the_server_knows_its_own_names_and_no_others(deployed: Deployed) -> None:
    port = deployed.uri.rpartition(":")[2]
    address = f"{deployed.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    answers = {
        host: requests.get(address, headers={"Host": host}, timeout=30).status_code for host in (f"mlflow:{port}", "evil.example")
    }
    assert answers == {f"mlflow:{port}": 200, "evil.example": 403}
    assert requests.get(f"{deployed.uri}/health", headers={"Host": "10.1.2.3:5000"}, timeout=30).ok, "a probe of Kubernetes"


def test_a_page_of_another_origin_cannot_write(deployed: Deployed) -> None:
    address = f"{deployed.uri}/api/2.0/mlflow/experiments/create"
    answer = requests.post(address, json={"name": "theirs"}, headers={"Origin": "https://evil.example"}, timeout=30)
    assert answer.status_code == 403
    assert not deployed.query("SELECT 1 FROM experiments WHERE name = 'theirs'")


def test_the_password_is_in_no_log(deployed: Deployed, logged: Logged) -> None:
    assert PASSWORD not in deployed.log.read_text()
    assert logged.version is not None
