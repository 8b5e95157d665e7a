"""MLflow has the curves of a training, and how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from transplant_ray.organ.training import Point
from transplant_ray.recipe import TrackingSpec, TrainingSpec
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
