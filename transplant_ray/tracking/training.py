"""What MLflow gets of the training of an organ: a run with its settings and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from transplant_ray.errors import TrackingError
from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.organ.training import Point
from transplant_ray.recipe import TrackingSpec, TrainingSpec, redact_address
from transplant_ray.tracking.outages import is_outage
from transplant_ray.tracking.outbox import Outbox, num_entries
from transplant_ray.tracking.tracker import (
    FAILURE_SECONDS,
    FAREWELL_SECONDS,
    end_run,
    ended_with,
    milliseconds,
    opened_run,
)
from transplant_ray.versions import environment


class TrainingTracker:
    """One run. What it is told goes through an outbox, so that the training waits for no server."""

    def __init__(self, client: MlflowClient, run_id: str, spec: TrackingSpec, say: Callable[[str], None]) -> None:
        self.client, self.run_id, self.spec, self.say = client, run_id, spec, say
        self.outbox = Outbox(is_outage, say)

    @classmethod
    def start(cls, name: str, training: TrainingSpec, spec: TrackingSpec, say: Callable[[str], None]) -> TrainingTracker:
        """Reach the server and open the run. TrackingError where that does not go well at once."""
        with opened_run(spec, name) as (client, _, run_id):
            settings = training.model_dump(mode="json", exclude={"data", "text"})
            client.log_batch(run_id, params=[Param(key, str(value)) for key, value in settings.items()])
            client.log_dict(run_id, environment(), "environment.json")
        return cls(client, run_id, spec, say)

    @property
    def refused(self) -> tuple[str, ...]:
        """What the server did not take, each with the reason."""
        return tuple(self.outbox.refused)

    def log_point(self, point: Point) -> None:
        """Losses with their perplexities, by step."""
        at = milliseconds()
        metrics = [Metric(name, value, at, point.step) for name, value in point_metrics(point).items()]
        self.outbox.post(f"step {point.step}", lambda _: self.client.log_batch(self.run_id, metrics=metrics, synchronous=True))

    def log_record(self, record: Mapping[str, Any]) -> None:
        """What the organ says of its training."""
        self.outbox.post("training.json", lambda _: self.client.log_dict(self.run_id, dict(record), "training.json"))

    def finish(self) -> None:
        """Says what the server refused. TrackingError where it has not everything else after the patience of the settings."""
        self._end("FINISHED")
        unsent = self.outbox.drain(self.spec.patience)
        self.outbox.close()
        if unsent:
            raise TrackingError(
                f"`tracking.uri` {redact_address(self.spec.uri)}: does not answer; {num_entries(unsent)} could not be sent. The "
                "organ is written, and has the end of its curve in organ.json."
            )
        if self.refused:
            self.say(f"MLflow refused {num_entries(len(self.refused))} of this training, the first: {self.refused[0]}")

    def abandon(self, status: str) -> None:
        self._end(status)
        self.outbox.close(FAREWELL_SECONDS if status == "KILLED" else FAILURE_SECONDS)

    def _end(self, status: str) -> None:
        at = milliseconds()
        self.outbox.post("the end of the run", lambda _: end_run(self.client, self.run_id, status, at, self.refused))


def point_metrics(point: Point) -> dict[str, float]:
    values = {
        "loss": point.loss,
        "perplexity": None if point.loss is None else perplexity(point.loss),
        "held_out_loss": point.held_out,
        "held_out_perplexity": None if point.held_out is None else perplexity(point.held_out),
        "lr": point.lr,
        "tokens": float(point.tokens),
    }
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def tracked_training(
    name: str, training: TrainingSpec, spec: TrackingSpec, say: Callable[[str], None]
) -> Iterator[TrainingTracker]:
    """A run for the block."""
    tracker = TrainingTracker.start(name, training, spec, say)
    with ended_with(tracker):
        yield tracker
