"""What MLflow gets: a parent run per sweep, a child run per trial, the winner's checkpoint as a version of a registered model."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line for every trial, passwords in addresses included

import requests
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from transplant_ray.errors import TrackingError
from transplant_ray.evaluate.results import Result
from transplant_ray.evaluate.verdict import Verdict
from transplant_ray.recipe import Recipe, TrackingSpec, redact
from transplant_ray.storage import RunFolder

METRICS = (
    "accuracy",
    "score",
    "ci_low",
    "ci_high",
    "tir",
    "recovery",
    "correct",
    "n",
    "num_modules",
    "num_parameters",
    "seconds",
    "loss",
    "kl",
    "guard_share",
    "moved",
    "worth",
)
PARAMS = ("role", "ranker", "kind", "k", "alpha", "channels", "penalty", "variant")
REACH_SECONDS = 10
LIBRARIES = ("transplant-ray", "ray", "torch", "transformers", "safetensors", "mlflow", "numpy", "pyarrow")


class Tracker:
    """One parent run. Made by `Tracker.start`; every method talks to the server at once."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str, recipe: Recipe) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.recipe = recipe

    @classmethod
    def start(cls, recipe: Recipe) -> Tracker:
        """Reach the server and open the parent run. TrackingError where it cannot be reached."""
        spec = recipe.tracking
        with _tracking_errors(spec):
            _reach(spec)
            logging.getLogger("mlflow.store").setLevel(logging.ERROR)
            logging.getLogger("alembic").setLevel(logging.ERROR)
            client = MlflowClient(tracking_uri=spec.uri, registry_uri=spec.uri)
            experiment = client.get_experiment_by_name(spec.experiment)
            experiment_id = (
                experiment.experiment_id if experiment else client.create_experiment(spec.experiment, _artifacts_beside(spec.uri))
            )
            run = client.create_run(experiment_id, run_name=recipe.name, tags={"transplant_ray.recipe": recipe.identity()})
            tracker = cls(client, experiment_id, run.info.run_id, recipe)
            client.log_batch(tracker.run_id, params=[Param(key, value) for key, value in _flat(recipe)])
            client.log_text(tracker.run_id, recipe.to_yaml(), "recipe.yaml")
            client.log_dict(tracker.run_id, environment(), "environment.json")
        return tracker

    def log_trial(self, result: Result, description: Mapping[str, Any]) -> str:
        """A child run with parameters, metrics and `variant.json`; returns its id."""
        run = self.client.create_run(
            self.experiment_id,
            run_name=result.label,
            tags={"mlflow.parentRunId": self.run_id, "variant": result.variant},
        )
        run_id: str = run.info.run_id
        self.client.log_batch(run_id, metrics=_metrics(result), params=_params(result))
        self.client.log_dict(run_id, dict(description), "variant.json")
        for tag, text in (("error", result.error), ("stopped", result.stopped)):
            if text:
                self.client.set_tag(run_id, tag, text)
        self.client.set_terminated(run_id, "FAILED" if result.error else "FINISHED")
        return run_id

    def log_summary(
        self, folder: RunFolder, summary: Mapping[str, float], figures: Mapping[str, Figure], verdict: Verdict | None
    ) -> None:
        """Tables and figures into the parent run, and the verdict as its tag and description."""
        if verdict is not None:
            self.client.set_tag(self.run_id, "verdict", verdict.conclusion)
            self.client.set_tag(self.run_id, "mlflow.note.content", f"**{verdict.conclusion}**: {verdict.sentence}")
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, 0) for name, value in summary.items()])
        for path in (folder.rankings, folder.results, folder.guards, folder.summary):
            self.client.log_artifact(self.run_id, str(path))
        for name, figure in figures.items():
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png")

    def log_report(self, folder: RunFolder) -> None:
        """The report and its tables into the parent run."""
        for path in folder.reports:
            self.client.log_artifact(self.run_id, str(path))

    def log_winner(self, run_id: str, result: Result, folder: RunFolder) -> str | None:
        """What the recipe wants of the winner in its run; a checkpoint also as a model version, returned as `name/version`.

        A checkpoint in an object store is registered where it is; any other is uploaded: a server refuses paths of other machines.
        """
        self.client.set_tag(run_id, "winner", "true")
        now = int(time.time() * 1000)
        metrics = [Metric(f"test_{m.key}", m.value, now, 0) for m in _metrics(result)]
        self.client.log_batch(run_id, metrics=metrics)
        if self.recipe.tracking.upload == "none":
            return None
        self.client.log_artifacts(run_id, str(folder.delta), folder.delta.name)
        if self.recipe.tracking.upload == "delta":
            return None
        if folder.public_address is not None:
            version = self._register(run_id, f"{folder.public_address}/{folder.checkpoint.name}")
            if version is not None:
                return version
        self.client.log_artifacts(run_id, str(folder.checkpoint), folder.checkpoint.name)
        return self._register(run_id, f"{self.client.get_run(run_id).info.artifact_uri}/{folder.checkpoint.name}")

    def _register(self, run_id: str, source: str) -> str | None:
        """`name/version` of a new model version; None where the server does not accept the address."""
        name = self.recipe.name
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        try:
            version = self.client.create_model_version(name, source=source, run_id=run_id)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return None
        self.client.set_tag(run_id, "checkpoint", source)
        self.client.set_registered_model_alias(name, "winner", version.version)
        return f"{name}/{version.version}"

    def finish(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


@contextmanager
def tracked(recipe: Recipe) -> Iterator[Tracker]:
    """A parent run for the block; it ends FAILED, or KILLED by Ctrl-C, where the block does."""
    tracker = Tracker.start(recipe)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of SIGTERM while it starts
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # our own package need not be installed where it travels with a job
        return "not installed"


def _artifacts_beside(uri: str) -> str | None:
    """Where artifacts of a sqlite database go: MLflow itself would choose the working directory, which a submitted job loses."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve().parent / "mlartifacts")


def _reach(spec: TrackingSpec) -> None:
    """MLflow's own client tries an unreachable server for minutes; ask once, briefly, before."""
    if spec.uri.startswith(("http://", "https://")):
        requests.get(f"{spec.uri.rstrip('/')}/health", timeout=REACH_SECONDS).raise_for_status()


@contextmanager
def _tracking_errors(spec: TrackingSpec) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException, OSError, ImportError) as error:
        reason = redact(str(error).splitlines()[0][:300])
        raise TrackingError(
            f"`tracking.uri` {redact(spec.uri)}: cannot be used ({reason}). Start the server, or use tracking.uri=sqlite:///mlflow.db."
        ) from None


def _metrics(result: Result) -> list[Metric]:
    now = int(time.time() * 1000)
    values = {name: getattr(result, name) for name in METRICS}
    return [Metric(name, float(value), now, 0) for name, value in values.items() if value is not None]


def _params(result: Result) -> list[Param]:
    values = {name: getattr(result, name) for name in PARAMS}
    return [Param(name, str(value)) for name, value in values.items() if value is not None]


def _flat(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The recipe as parameters, `section.key` → text; addresses without their passwords."""
    for section, value in recipe.model_dump(mode="json").items():
        for key, item in value.items() if isinstance(value, dict) else ((None, value),):
            yield (section if key is None else f"{section}.{key}"), redact(str(item))[:500]
