"""MLflow has the curves of a training, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import Server

from transplant_ray.errors import TrackingError
from transplant_ray.organ.training import Point
from transplant_ray.recipe import TrackingSpec, TrainingSpec
from transplant_ray.tracking import tracker as tracker_module
from transplant_ray.tracking.tracker import ended_with
from transplant_ray.tracking.training import TrainingTracker, tracked_training

SPEC = TrainingSpec(data=("the text.jsonl",), steps=20)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingSpec:
    return TrackingSpec(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", experiment="organs")


def train(tracking: TrackingSpec, name: str, error: BaseException | None = None) -> TrainingTracker:
    with tracked_training(name, SPEC, tracking, print) as tracker:
        tracker.log_point(Point(0, 0, None, 1e-4, 3.0))
        tracker.log_point(Point(10, 640, 2.0, 2e-4))
        tracker.log_point(Point(20, 1280, 1.0, 1e-4, 2.0))
        if error is not None:
            raise error
        tracker.log_record({"steps": 20})
    return tracker


def test_a_run_has_settings_curves_and_the_record(tracking: TrackingSpec) -> None:
    tracker = train(tracking, "calm")
    client = MlflowClient(tracking_uri=tracking.uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "calm")
    assert run.data.params["steps"] == "20"
    assert "the text" not in str(run.data.params)
    history = {name: client.get_metric_history(tracker.run_id, name) for name in ("loss", "held_out_loss", "tokens")}
    assert {name: [(m.step, m.value) for m in metrics] for name, metrics in history.items()} == {
        "loss": [(10, 2.0), (20, 1.0)],
        "held_out_loss": [(0, 3.0), (20, 2.0)],
        "tokens": [(0, 0.0), (10, 640.0), (20, 1280.0)],
    }
    assert Path(client.download_artifacts(tracker.run_id, "training.json")).read_text().split() == ["{", '"steps":', "20", "}"]


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_training_that_ends_early_says_so(tracking: TrackingSpec, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)):
        train(tracking, status, error)
    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name("organs")
    assert experiment is not None
    runs = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert runs[status] == status


def test_what_was_refused_is_said_at_the_end_and_of_the_run() -> None:
    server, said = Server(troubles={"log_batch": ["refused", "refused"]}), list[str]()
    tracker = TrainingTracker(server, "run", TrackingSpec(), said.append)
    with ended_with(tracker):
        for step in (0, 10, 20):
            tracker.log_point(Point(step, 64 * step, 2.0, 1e-4))
    assert tracker.refused == ("step 0: a value is too long", "step 10: a value is too long")
    assert server.tags["run", "incomplete"] == "refused: 2 entries, the first: step 0: a value is too long"
    assert server.ended["run"][0] == "FINISHED"
    assert said[-1] == "MLflow refused 2 entries of this training, the first: step 0: a value is too long"


def test_a_start_that_fails_leaves_no_run_that_seems_to_go_on(tracking: TrackingSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(troubles={"log_batch": ["refused"]})
    monkeypatch.setattr(tracker_module, "MlflowClient", lambda **_: server)
    with pytest.raises(TrackingError, match="cannot be used"):
        TrainingTracker.start("organ", SPEC, tracking, print)
    assert {id: status for id, (status, _) in server.ended.items()} == {"run-0": "FAILED"}


def test_mlflow_reports_to_nobody_whichever_module_is_imported_first() -> None:
    """MLflow decides when it is imported; a module that does nothing else stands for all."""
    code = "import transplant_ray.tracking.outages; from mlflow.telemetry import client; print(client.get_telemetry_client())"
    asked = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}  # under CI and pytest it is silent anyway
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
