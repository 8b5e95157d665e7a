"""`submit`, `status`, `logs` and `stop` against a real head with a dashboard and a token.

Where only the way to the cluster and back is looked at, a shell script stands for Python: a sweep costs half a minute.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from integration.helpers import SPLIT, Finished, Head, Place, Swept, free_port, read_results, run_main
from mlflow import MlflowClient
from stacks import save_model, trained_copy
from trainings import sums

from transplant_ray.pipeline.organs import extract
from transplant_ray.recipe import load_recipe

SWEPT = ["variant", "role", "split", "n", "correct", "accuracy", "winner"]


@dataclass(frozen=True)
class Sender:
    """Somebody with a recipe, and a head to send it to."""

    head: Head
    place: Place
    recipe: Path

    @property
    def address(self) -> str:
        return self.head.client.get_address()

    def __call__(self, command: str, *argv: object) -> Finished:
        return run_main(command, *argv, "--address", self.address)

    def script(self, name: str, *argv: object) -> Finished:
        """Submit, with a script instead of Python."""
        return self("submit", self.recipe, "--python", self.place.path / name, *argv)

    def process(self, *argv: object, **options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "transplant_ray.cli", *map(str, argv), "--address", self.address]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]

    def until(self, id: str, status: str) -> None:
        end = time.monotonic() + 120
        while self.head.client.get_job_status(id) != status:
            assert time.monotonic() < end, f"{id} is not {status}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def sender(head: Head, template: Place, workplace: Path) -> Sender:
    """The recipe of `swept`, with its models and data beside it."""
    (workplace / "sender").mkdir()
    place = template.copy(workplace / "sender")
    shutil.copy(workplace / "empty.db", workplace / "submitted.db")
    task = {**place.task, "data": "answers.jsonl", "split": SPLIT}
    uri = f"sqlite:///{workplace / 'submitted.db'}"
    recipe = place.recipe(task=task, tracking={"uri": uri}, storage=str(workplace / "submitted"))
    scripts = {"fails": "find . -type f; ls ${PYTHONPATH%%:*}; echo $GREETING; exit 1", "waits": "echo waiting; exec sleep 300"}
    for name, lines in scripts.items():
        (place.path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (place.path / name).chmod(0o755)
    return Sender(head, place, recipe)


@pytest.fixture(scope="module")
def finished(sender: Sender) -> Finished:
    return sender("submit", sender.recipe, "resources.evaluators=1", "--python", sys.executable, "--submission-id", "tiny-sweep")


@pytest.fixture
def waiting(sender: Sender, request: pytest.FixtureRequest) -> Iterator[str]:
    """A job that runs until it is stopped."""
    started = sender.script("waits", "--no-wait", "--submission-id", f"waiting-{request.node.name}")
    assert started.code == 0, started.err
    id = started.out.strip()
    sender.until(id, "RUNNING")
    yield id
    sender.head.client.stop_job(id)


@pytest.mark.slow
def test_a_recipe_with_its_inputs_runs_on_the_cluster_and_ends_with_the_same_numbers(
    sender: Sender, finished: Finished, swept: Swept, workplace: Path
) -> None:
    assert finished.code == 0, finished.out[-3000:] + finished.err
    folder = workplace / "submitted" / "tiny"
    assert f"results: {folder}" in finished.out
    assert f"results go to {folder}" in finished.err
    pd.testing.assert_frame_equal(read_results(folder)[SWEPT], swept.results[SWEPT])
    job = sender.head.client.get_job_info("tiny-sweep")
    assert job.metadata is not None
    assert job.metadata["recipe"] == "tiny"
    assert job.metadata["identity"] == json.loads((folder / "summary.json").read_text())["recipe"]


@pytest.mark.slow
def test_the_same_recipe_again_is_the_same_recipe_to_the_results_that_are_there(
    sender: Sender, finished: Finished, swept: Swept, workplace: Path
) -> None:
    again = sender("submit", sender.recipe, "--command", "rank", "--python", sys.executable, "--entrypoint-num-cpus", 1)
    assert (finished.code, again.code) == (0, 0), again.out + again.err
    rankings = (pd.read_parquet(folder / "rankings.parquet") for folder in (workplace / "submitted" / "tiny", swept.folder))
    pd.testing.assert_frame_equal(*rankings)


@pytest.mark.slow
def test_the_driver_may_be_on_any_node(sender: Sender, swept: Swept, workplace: Path) -> None:
    """Its evaluators are on the head, which has the CPUs and the GPU; it itself is on a node that has neither."""
    storage = workplace / "elsewhere"
    changes = ["resources.evaluators=1", f"storage={storage}", "--entrypoint-resource", "desk=1"]
    with sender.head.joined(desk=1) as node:
        sent = sender("submit", sender.recipe, *changes, "--python", sys.executable, "--submission-id", "elsewhere")
        assert sent.code == 0, sent.out[-3000:] + sent.err
        assert sender.head.client.get_job_info("elsewhere").driver_node_id == node
    pd.testing.assert_frame_equal(read_results(storage / "tiny")[SWEPT], swept.results[SWEPT])
    log = [json.loads(line) for line in (storage / "tiny" / "log.jsonl").read_text().splitlines()]
    places = {line["node"] for line in log if line["event"] == "shard done" and line.get("evaluator")}
    assert places
    assert not any(node.startswith(place) for place in places)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["organ sweep", "organ compare"])
def test_an_organ_recipe_with_its_model_organ_and_texts_runs_on_the_cluster(
    sender: Sender, empty_database: Path, tmp_path: Path, command: str
) -> None:
    recipe = write_organ_recipe(tmp_path / "here", command)
    changes = [f"storage={tmp_path / 'runs'}", f"tracking.uri=sqlite:///{shutil.copy(empty_database, tmp_path / 'mlflow.db')}"]
    ended = sender("submit", recipe, *changes, "--python", sys.executable, "--submission-id", command.replace(" ", "-"))
    assert ended.code == 0, ended.out[-3000:] + ended.err
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    if command == "organ sweep":
        assert summary["confirmed"]["exported_agrees"]["equal"] == 8
        assert "/carried/" in summary["organs"]["a"]["folder"]
    else:
        assert {each["method"] for each in summary["learnt"]} == {"before", "full"}
        assert "/carried/" in summary["models"]["model"]
    metadata = sender.head.client.get_job_info(command.replace(" ", "-")).metadata
    assert metadata is not None
    assert metadata["command"] == command


def write_organ_recipe(folder: Path, command: str) -> Path:
    """With all that it names beside it."""
    save_model(folder / "model", num_hidden_layers=2)
    (folder / "texts").mkdir()
    for seed, name in enumerate(("domain", "general")):
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in sums(80, seed)))
    texts = {
        "domain": {"data": "texts/domain.jsonl", "share": [0, 0.5], "contexts": 4},
        "general": {"data": "texts/gen*.jsonl", "contexts": 4},
    }
    if command == "organ sweep":
        trained_copy(extract(str(folder / "model"), "0", folder / "before"), folder / "organ")
        grid = {"sweep": {"positions": [0], "modes": ["insert"]}, "controls": {"untrained": False, "alone": False}}
        settings = {"recipient": {"model": "./model"}, "organs": {"a": "organ"}, "context": 16, **grid, **texts}
    else:
        training = {"data": "texts/domain.jsonl", "share": [0.5, 1], "context": 16, "steps": 2, "batch": 4}
        settings = {"model": {"model": "./model"}, "training": training, "methods": ["full"], "tune": {"lr": [0.001]}, "seeds": [0]}
        settings |= texts
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", **settings}))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_status_and_logs_of_a_job_that_has_ended(sender: Sender, finished: Finished) -> None:
    status, log, every = sender("status", "tiny-sweep"), sender("logs", "tiny-sweep"), sender("status")
    assert (finished.code, status.code, log.code, every.code) == (0, 0, 0, 0)
    for words in ("SUCCEEDED", "tiny-sweep", "exit code  0", load_recipe(sender.recipe).name):
        assert words in status.out
    assert log.out == finished.out
    assert "tiny-sweep" in every.out
    assert sender("logs", "tiny-sweep", "--follow").code == 0
    assert "nothing to stop" in sender("stop", "tiny-sweep").err


def test_the_exit_code_and_the_log_of_a_job_that_fails_are_those_of_the_command(sender: Sender) -> None:
    environment = sender.place.path / "environment.yaml"
    environment.write_text("env_vars: {GREETING: it said this}\nexcludes: [transplant_ray]\n")
    failed = sender.script("fails", "--runtime-env", environment)
    assert failed.code == 1
    assert "it said this\n" in failed.out
    assert "FAILED, exit code 1" in failed.err
    assert "\ntransplant_ray\n" in failed.out  # the first place where Python looks
    travelled = {Path(line).name for line in failed.out.splitlines() if line.startswith("./")}
    models = {path.name for name in ("source", "target") for path in (sender.place.path / name).iterdir()}
    assert travelled == {"recipe.yaml", "answers.jsonl", *models}


@pytest.mark.slow
def test_an_input_that_is_not_on_the_cluster_ends_the_job_with_our_own_error(sender: Sender) -> None:
    failed = sender("submit", sender.recipe, "target.model=/shared/nowhere", "--python", sys.executable)
    assert failed.code == 2
    assert "CheckpointError: /shared/nowhere: no such folder" in failed.out


def test_stop_ends_a_job_by_its_id(sender: Sender, waiting: str) -> None:
    assert sender("status", waiting).out.split()[:4] == ["job", waiting, "status", "RUNNING"]
    stopped = sender("stop", waiting)
    assert stopped.code == 0, stopped.err
    assert "STOPPED" in stopped.err
    assert sender.head.client.get_job_status(waiting) == "STOPPED"
    followed = sender("logs", waiting, "--follow")
    assert followed.code == 143
    assert "waiting" in followed.out


@pytest.mark.slow
def test_a_sweep_that_is_stopped_ends_as_by_ctrl_c_and_submitted_again_goes_on(sender: Sender, workplace: Path) -> None:
    log = workplace / "halted" / "halted" / "log.jsonl"
    changes = ["name=halted", f"storage={workplace / 'halted'}", "resources.batch_size=4", "resources.shard_size=5"]
    sent = sender("submit", sender.recipe, *changes, "--no-wait", "--python", sys.executable, "--submission-id", "halted")
    assert sent.code == 0, sent.err
    end = time.monotonic() + 240
    while not (log.exists() and '"variants asked"' in log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    assert "STOPPED" in sender("stop", "halted").err
    assert {"event": "sweep ends", "exit": 143}.items() <= json.loads(log.read_text().splitlines()[-1]).items()
    assert "stopped by SIGTERM; the same command goes on where it stopped" in sender("logs", "halted").out
    (run,) = MlflowClient(load_recipe(sender.recipe).tracking.uri).search_runs(["1"], "attributes.run_name = 'halted'")
    assert run.info.status == "KILLED"
    known = sum(pq.read_metadata(part).num_rows for part in (workplace / "halted" / ".ledger").rglob("*.parquet"))
    again = sender("submit", sender.recipe, *changes, "--python", sys.executable, "--submission-id", "resubmitted")
    assert again.code == 0, again.err
    assert json.loads((log.parent / "summary.json").read_text())["recalled"] >= known > 0


def read_until(words: str, stream: Callable[[], bytes]) -> bytes:
    heard = b""
    while words.encode() not in heard:
        piece = stream()
        assert piece, heard
        heard += piece
    return heard


@pytest.mark.slow
def test_ctrl_c_asks_and_yes_stops_the_job(sender: Sender) -> None:
    ours, theirs = pty.openpty()
    argv = ("submit", sender.recipe, "--python", sender.place.path / "waits", "--submission-id", "asked")
    process = sender.process(*argv, stdin=theirs, start_new_session=True)
    assert process.stdout is not None
    assert process.stderr is not None
    read_until("waiting", process.stdout.readline)
    process.send_signal(signal.SIGINT)
    read_until("Stop job asked?", lambda: os.read(process.stderr.fileno(), 4096))  # type: ignore[union-attr]
    os.write(ours, b"y\n")
    assert process.wait(120) == 130
    assert sender.head.client.get_job_status("asked") == "STOPPED"


@pytest.mark.slow
def test_ctrl_c_where_nobody_can_be_asked_leaves_the_job_running(sender: Sender, waiting: str) -> None:
    process = sender.process("logs", waiting, "--follow", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    read_until("waiting\n", process.stdout.readline)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert sender.head.client.get_job_status(waiting) == "RUNNING"


@pytest.mark.slow
def test_an_unknown_id_is_answered_with_the_nearest(sender: Sender, waiting: str) -> None:
    for command in ("status", "logs", "stop"):
        unknown = sender(command, waiting[:-1])
        assert unknown.code == 2
        assert f"has no job '{waiting[:-1]}'. Did you mean {waiting}" in unknown.err
    assert sender.head.client.get_job_status(waiting) == "RUNNING"


@pytest.mark.slow
def test_an_id_that_is_taken_is_refused(sender: Sender, waiting: str) -> None:
    taken = sender.script("fails", "--submission-id", waiting)
    assert taken.code == 2
    assert "already" in taken.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Set RAY_AUTH_MODE=token"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"},
            "The one that was sent is another cluster's",
        ),
    ],
)
def test_without_the_clusters_token_nothing_is_shown_but_how_to_get_it(
    sender: Sender, variables: dict[str, str], advice: str
) -> None:
    process = sender.process("status", env={**os.environ, **variables})
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, b"")
    assert advice in err.decode()
    assert "0123456789abcdef" not in err.decode()


@pytest.mark.slow
def test_a_head_that_is_not_there_is_told_at_once_with_what_to_do(sender: Sender) -> None:
    nowhere = f"http://me:open-sesame@127.0.0.1:{free_port()}"
    for argv in (("submit", sender.recipe), ("status",), ("stop", "one")):
        lost = run_main(*argv, "--address", nowhere)
        assert lost.code == 2
        assert "cannot be reached" in lost.err
        assert "--address http://HEAD:8265" in lost.err
        assert "open-sesame" not in lost.err


def test_a_recipe_that_would_lose_its_results_never_reaches_the_cluster(sender: Sender) -> None:
    before = len(sender.head.client.list_jobs())
    refused = sender("submit", sender.recipe, "storage=runs")
    assert refused.code == 2
    assert "e.g. storage=/shared/runs" in refused.err
    assert len(sender.head.client.list_jobs()) == before
