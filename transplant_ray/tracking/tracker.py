"""What MLflow gets: a parent run per sweep, a child run per trial, the winner's checkpoint as a version of a registered model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import requests
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from transplant_ray.errors import TrackingError
from transplant_ray.evaluate.results import Result
from transplant_ray.evaluate.verdict import Verdict
from transplant_ray.recipe import OrganRecipe, Recipe, TrackingSpec, recorded, redact, redact_address
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.children import Children
from transplant_ray.tracking.outages import is_outage
from transplant_ray.tracking.outbox import Outbox, num_entries
from transplant_ray.versions import environment

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
FAREWELL_SECONDS = 2.5
"""After Ctrl-C."""
FAILURE_SECONDS = 60.0
"""After an error, while the server answers: what was measured before it is worth having."""


class Tracker:
    """One parent run. Made by `Tracker.start`; what it is told then goes through an outbox, so that nobody waits for a server."""

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        run_id: str,
        recipe: Recipe | OrganRecipe,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.recipe = recipe
        self.outbox = Outbox(is_outage, say)
        self.post = self.outbox.post
        self._parent: Future[str] = Future()
        self._parent.set_result(run_id)
        self._children = Children(client, experiment_id, run_id, "variant")

    @classmethod
    def start(cls, recipe: Recipe | OrganRecipe, say: Callable[[str], None] = lambda _: None) -> Tracker:
        """Reach the server and open the parent run. TrackingError where that, or an artifact, does not go well at once.

        `say` gets what a user should read while the sweep runs.
        """
        with opened_run(recipe.tracking, recipe.name, {"transplant_ray.recipe": recipe.identity()}) as (
            client,
            experiment_id,
            run_id,
        ):
            client.log_batch(run_id, params=[Param(key, value) for key, value in _flat(recipe)])
            client.log_text(run_id, recipe.to_yaml(), "recipe.yaml")
            client.log_dict(run_id, environment(), "environment.json")
        return cls(client, experiment_id, run_id, recipe, say)

    @property
    def refused(self) -> tuple[str, ...]:
        """What the server did not take, each with the reason."""
        return tuple(self.outbox.refused)

    def log_trial(self, result: Result, description: Mapping[str, Any]) -> Future[str]:
        """A child run with parameters, metrics and `variant.json`; its id, once it has one."""
        tags = {key: text for key, text in (("error", result.error), ("stopped", result.stopped)) if text}
        return self.log_child(result.label, result.variant, _params(result), _metrics(result), tags, description)

    def log_child(
        self,
        label: str,
        variant: str,
        params: Sequence[Param],
        metrics: Sequence[Metric],
        tags: Mapping[str, str],
        description: Mapping[str, Any],
    ) -> Future[str]:
        """A child run, FAILED where a tag says `error`; `description` becomes its `variant.json`. Its id, once it has one."""
        now, content, name = milliseconds(), dict(description), f"trial {label}"
        status = "FAILED" if "error" in tags else "FINISHED"
        marks = [RunTag(key, text) for key, text in tags.items()]
        child = self.post(f"the run of {name}", lambda again: self._children.make(label, variant, now, again))
        self.post(f"the numbers of {name}", lambda _: self._log(child.result(), metrics=metrics, params=params, tags=marks))
        self.post(f"the variant of {name}", lambda _: self.client.log_dict(child.result(), content, "variant.json"))
        self.post(f"the end of {name}", lambda _: self.client.set_terminated(child.result(), status, end_time=now))
        return child

    def log_summary(
        self, folder: RunFolder, summary: Mapping[str, float], figures: Mapping[str, Figure], verdict: Verdict | None
    ) -> None:
        """Tables and figures into the parent run, and the verdict as its tag and description."""
        self.log_headline(summary, figures, None if verdict is None else (verdict.conclusion, verdict.sentence))
        self.log_files(folder.rankings, folder.results, folder.guards)

    def log_headline(self, summary: Mapping[str, float], figures: Mapping[str, Figure], verdict: tuple[str, str] | None) -> None:
        """Metrics and figures of the parent run; of a verdict, its conclusion as a tag and both as the description."""
        told = {} if verdict is None else {"verdict": verdict[0], "mlflow.note.content": f"**{verdict[0]}**: {verdict[1]}"}
        now = milliseconds()
        metrics = [Metric(name, value, now, 0) for name, value in summary.items()]
        tags = [RunTag(key, text) for key, text in told.items()]
        self.post("the headline", lambda _: self._log(self.run_id, metrics=metrics, tags=tags))
        for name, figure in figures.items():
            self._post_image(figure, f"{name}.png")

    def log_files(self, *paths: Path) -> None:
        """Into the parent run, as they are when they are sent: nobody should change them any more."""
        for path in paths:
            self._post_file(self._parent, path, None)

    def log_winner(self, child: Future[str], result: Result, folder: RunFolder) -> Future[str | None]:
        """What the recipe wants of the winner in its run; a checkpoint also as a model version, returned as `name/version`."""
        return self.log_best(child, _metrics(result), folder)

    def log_best(self, child: Future[str], measured: Sequence[Metric], folder: RunFolder) -> Future[str | None]:
        """The same; `measured` is what it came to on test."""
        now = milliseconds()
        metrics = [Metric(f"test_{m.key}", m.value, now, 0) for m in measured]
        tags = [RunTag("winner", "true")]
        told: Future[str | None] = self.post(
            "the winner's numbers", lambda _: self._log(child.result(), metrics=metrics, tags=tags)
        )
        upload = self.recipe.tracking.upload
        if upload != "none":
            self._post_folder(child, folder.delta)
        return self._post_checkpoint(child, folder) if upload == "checkpoint" else told

    def _post_checkpoint(self, child: Future[str], folder: RunFolder) -> Future[str | None]:
        """In an object store it is registered where it is; any other is uploaded: a server refuses paths of other machines."""
        name, what = folder.checkpoint.name, "the model version"
        there = self.post(
            what,
            lambda again: folder.public_address and self._register(child.result(), f"{folder.public_address}/{name}", again),
        )
        self._post_folder(child, folder.checkpoint, unless=there)

        def register(again: bool) -> str | None:
            uploaded = f"{self.client.get_run(child.result()).info.artifact_uri}/{name}"
            return there.result() or self._register(child.result(), uploaded, again)

        return self.post(what, register)

    def _post_folder(self, run: Future[str], folder: Path, unless: Future[str | None] | None = None) -> None:
        """File by file, so that an outage costs the file in hand; not at all where `unless` has something."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._post_file(run, path, path.parent.relative_to(folder.parent).as_posix(), unless)

    def _post_file(self, run: Future[str], path: Path, under: str | None, unless: Future[str | None] | None = None) -> None:
        def send(_: bool) -> None:
            if unless is None or unless.result() is None:
                self.client.log_artifact(run.result(), str(path), under)

        self.post(path.name if under is None else f"{under}/{path.name}", send)

    def _post_image(self, figure: Figure, name: str) -> None:
        """Drawn here and now: matplotlib wants to be asked by one thread."""
        image = BytesIO()
        figure.savefig(image, format="png")

        def send(_: bool) -> None:
            with TemporaryDirectory() as folder:
                path = Path(folder, name)
                path.write_bytes(image.getvalue())
                self.client.log_artifact(self.run_id, str(path), "figures")

        self.post(f"figure {name}", send)

    def _log(self, run_id: str, metrics: Sequence[Metric], tags: Sequence[RunTag], params: Sequence[Param] = ()) -> None:
        """At once, whatever MLFLOW_ENABLE_ASYNC_LOGGING says: who only queues it cannot be asked again."""
        self.client.log_batch(run_id, metrics=metrics, params=params, tags=tags, synchronous=True)

    def _register(self, run_id: str, source: str, again: bool) -> str | None:
        """`name/version` of a new model version, or an earlier try's; None where the address is refused."""
        name = self.recipe.name
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'") if again else []
        try:
            made = [version for version in found if version.source == source]
            version = made[0] if made else self.client.create_model_version(name, source=source, run_id=run_id)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return None
        self.client.set_tag(run_id, "checkpoint", source, synchronous=True)
        self.client.set_registered_model_alias(name, "winner", version.version)
        return f"{name}/{version.version}"

    def drain(self) -> None:
        """Wait until the server has everything. TrackingError where it does not answer for longer than the recipe's patience."""
        spec = self.recipe.tracking
        unsent = self.outbox.drain(spec.patience)
        if unsent:
            known = "the ledger knows all outcomes" if self.recipe.ledger else "all is evaluated again, for `ledger` is off"
            raise TrackingError(
                f"`tracking.uri` {redact_address(spec.uri)}: does not answer; a finished sweep has waited {spec.patience:g} s "
                f"(`tracking.patience`) and could not send {num_entries(unsent)}. All results are in "
                f"{redact_address(self.recipe.storage)}/{self.recipe.name}. To have them in MLflow too, start the server and run "
                f"the same recipe again: {known}, and the new run has everything."
            )

    def finish(self) -> None:
        """End the parent run, when the server has everything."""
        now = milliseconds()
        self.post("the end of the run", lambda _: self._end("FINISHED", now))
        self.drain()
        self.outbox.close()

    def _end(self, status: str, at: int) -> None:
        end_run(self.client, self.run_id, status, at, self.refused)
        self._children.remove_doubles()

    def abandon(self, status: str) -> None:
        """After Ctrl-C or an error: the status, and what waits where the server answers and it does not take long."""
        farewell = _say_farewell(self.client, self.run_id, status)
        self.outbox.close(FAREWELL_SECONDS if status == "KILLED" else FAILURE_SECONDS)
        farewell.join(FAREWELL_SECONDS)


class Endable(Protocol):
    """A run that is told how the work ended."""

    def finish(self) -> None: ...
    def abandon(self, status: str) -> None: ...


@contextmanager
def ended_with(run: Endable) -> Iterator[None]:
    """The run ends with the block: FAILED, or KILLED by Ctrl-C or SIGTERM, where the block does."""
    try:
        yield
        run.finish()
    except BaseException as error:  # Ctrl-C and SIGTERM are none of `Exception`
        run.abandon(_status_after(error))
        raise


def _status_after(error: BaseException) -> str:
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _say_farewell(client: MlflowClient, run_id: str, status: str) -> threading.Thread:
    """The end of a run, by a thread: who waits for it need not wait long."""
    at = milliseconds()

    def say() -> None:
        with suppress(Exception):  # the server may be what the work has ended of
            client.set_terminated(run_id, status, end_time=at)

    farewell = threading.Thread(target=say, daemon=True)
    farewell.start()
    return farewell


def end_run(client: MlflowClient, run_id: str, status: str, at: int, refused: Sequence[str]) -> None:
    """A run of which the server did not take everything says so in its tag `incomplete`."""
    if refused:
        text = f"refused: {num_entries(len(refused))}, the first: {refused[0]}"
        client.set_tag(run_id, "incomplete", text, synchronous=True)
    client.set_terminated(run_id, status, end_time=at)


@contextmanager
def tracked(recipe: Recipe | OrganRecipe, say: Callable[[str], None]) -> Iterator[Tracker]:
    """A parent run for the block."""
    tracker = Tracker.start(recipe, say)
    with ended_with(tracker):
        yield tracker


def _artifacts_beside(uri: str) -> str | None:
    """Where artifacts of a sqlite database go: MLflow itself would choose the working directory, which a submitted job loses."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve().parent / "mlartifacts")


def _reach(spec: TrackingSpec) -> None:
    """MLflow's own client tries an unreachable server for minutes; ask once, briefly, before."""
    if spec.uri.startswith(("http://", "https://")):
        requests.get(f"{spec.uri.rstrip('/')}/health", timeout=REACH_SECONDS).raise_for_status()


def _open_experiment(spec: TrackingSpec) -> tuple[MlflowClient, str]:
    """A client that has reached the server, and the id of the experiment, which is made where it is not there."""
    _reach(spec)
    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # a traceback each time that a database is busy
    logging.getLogger("alembic").setLevel(logging.ERROR)
    client = MlflowClient(tracking_uri=spec.uri, registry_uri=spec.uri)
    found = client.get_experiment_by_name(spec.experiment)
    made = found.experiment_id if found else client.create_experiment(spec.experiment, _artifacts_beside(spec.uri))
    return client, made


@contextmanager
def opened_run(spec: TrackingSpec, name: str, tags: Mapping[str, str] | None = None) -> Iterator[tuple[MlflowClient, str, str]]:
    """Reach the server and open a run: a client, the experiment's id and the run's, which the block tells what it starts with.

    TrackingError where that does not go well at once; a run that is there by then has failed, and does not look as if it went on.
    """
    with _tracking_errors(spec):
        client, experiment_id = _open_experiment(spec)
        run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        try:
            yield client, experiment_id, run_id
        except BaseException as error:
            _say_farewell(client, run_id, _status_after(error)).join(FAREWELL_SECONDS)
            raise


@contextmanager
def _tracking_errors(spec: TrackingSpec) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException, OSError, ImportError) as error:
        reason = redact((str(error).splitlines() or [repr(error)])[0], spec.uri)[:300]
        raise TrackingError(
            f"`tracking.uri` {redact_address(spec.uri)}: cannot be used ({reason}). Start the server, or use tracking.uri=sqlite:///mlflow.db."
        ) from None


def milliseconds() -> int:
    """As MLflow counts: milliseconds. Taken when something is measured, whenever it is sent."""
    return int(time.time() * 1000)


def _metrics(result: Result) -> list[Metric]:
    now = milliseconds()
    values = {name: getattr(result, name) for name in METRICS}
    return [Metric(name, float(value), now, 0) for name, value in values.items() if value is not None]


def _params(result: Result) -> list[Param]:
    values = {name: getattr(result, name) for name in PARAMS}
    return [Param(name, str(value)) for name, value in values.items() if value is not None]


def _flat(recipe: Recipe | OrganRecipe) -> Iterator[tuple[str, str]]:
    """The recipe as parameters, `section.key` → text; addresses as they may be shown."""
    for section, value in recorded(recipe).items():
        for key, item in value.items() if isinstance(value, dict) else ((None, value),):
            yield (section if key is None else f"{section}.{key}"), redact(str(item))[:500]
