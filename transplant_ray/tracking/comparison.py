"""What MLflow gets of a comparison: a parent run with the findings, and a nested run for every training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from transplant_ray.errors import TrackingError
from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.organ.lessons import TEXTS, Learnt
from transplant_ray.recipe import CompareRecipe, recorded, redact, redact_address
from transplant_ray.tracking.children import Children
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
from transplant_ray.tracking.training import point_metrics
from transplant_ray.versions import environment


class ComparisonTracker:
    """One parent run. What it is told goes through an outbox, so that no training waits for a server."""

    def __init__(
        self, client: MlflowClient, experiment_id: str, run_id: str, recipe: CompareRecipe, say: Callable[[str], None]
    ) -> None:
        self.client, self.run_id, self.recipe = client, run_id, recipe
        self.outbox = Outbox(is_outage, say)
        self._children = Children(client, experiment_id, run_id, "lesson")

    @classmethod
    def start(cls, recipe: CompareRecipe, say: Callable[[str], None]) -> ComparisonTracker:
        """Reach the server and open the parent run. TrackingError where that does not go well at once."""
        with opened_run(recipe.tracking, recipe.name, {"transplant_ray.recipe": recipe.identity()}) as (
            client,
            experiment_id,
            run_id,
        ):
            client.log_batch(run_id, params=[Param(key, text) for key, text in _flat(recipe)])
            client.log_text(run_id, recipe.to_yaml(), "recipe.yaml")
            client.log_dict(run_id, environment(), "environment.json")
        return cls(client, experiment_id, run_id, recipe, say)

    @property
    def refused(self) -> tuple[str, ...]:
        """What the server did not take, each with the reason."""
        return tuple(self.outbox.refused)

    def log_learnt(self, learnt: Learnt) -> None:
        """A nested run with its settings, its curve and what was measured."""
        at, name = milliseconds(), _label(learnt)
        child = self.outbox.post(f"the run of {name}", lambda again: self._children.make(name, learnt.key, at, again))
        self.outbox.post(f"the numbers of {name}", lambda _: self._log(child, learnt, at))
        status = "FAILED" if learnt.error else "FINISHED"
        self.outbox.post(f"the end of {name}", lambda _: self.client.set_terminated(child.result(), status, end_time=at))

    def log_findings(self, sentences: str, numbers: Mapping[str, float], files: list[Path]) -> None:
        """The verdicts as the description of the parent run, its numbers, and files as they are when they are sent."""
        at = milliseconds()
        metrics = [Metric(name, value, at, 0) for name, value in numbers.items()]
        self.outbox.post("the headline", lambda _: self.client.log_batch(self.run_id, metrics=metrics, synchronous=True))
        self.outbox.post(
            "the description", lambda _: self.client.set_tag(self.run_id, "mlflow.note.content", sentences, synchronous=True)
        )
        for path in files:
            self._post_file(path)

    def finish(self) -> None:
        """TrackingError where the server has not everything after the patience of the settings."""
        self._end("FINISHED")
        unsent = self.outbox.drain(self.recipe.tracking.patience)
        self.outbox.close()
        if unsent:
            raise TrackingError(
                f"`tracking.uri` {redact_address(self.recipe.tracking.uri)}: does not answer; {num_entries(unsent)} could not be "
                f"sent. All results are in {self.recipe.storage}/{self.recipe.name}; the same command trains nothing and tells a "
                "new run."
            )

    def abandon(self, status: str) -> None:
        self._end(status)
        self.outbox.close(FAREWELL_SECONDS if status == "KILLED" else FAILURE_SECONDS)

    def _post_file(self, path: Path) -> None:
        self.outbox.post(path.name, lambda _: self.client.log_artifact(self.run_id, str(path)))

    def _log(self, child: Future[str], learnt: Learnt, at: int) -> None:
        run_id = child.result()
        said = {"model": learnt.model, "method": learnt.method, "stage": learnt.stage, "lr": learnt.lr, "seed": learnt.seed}
        said |= {"site": learnt.site, "error": learnt.error}
        params = [Param(name, str(value)[:500]) for name, value in said.items() if value is not None]
        curve = [Metric(name, v, at, point.step) for point in learnt.curve for name, v in point_metrics(point).items()]
        metrics = [*curve, *(Metric(name, value, at, 0) for name, value in learnt_metrics(learnt).items())]
        for start in range(0, max(1, len(metrics)), 1000):  # as many as MLflow takes at a time
            self.client.log_batch(run_id, metrics[start : start + 1000], params if start == 0 else (), synchronous=True)

    def _end(self, status: str) -> None:
        at = milliseconds()

        def end(_: bool) -> None:
            end_run(self.client, self.run_id, status, at, self.refused)
            self._children.remove_doubles()

        self.outbox.post("the end of the run", end)


def learnt_metrics(learnt: Learnt) -> dict[str, float]:
    means = {text: learnt.mean(text) for text in TEXTS}
    values: dict[str, float | None] = {
        "select_loss": learnt.select,
        **{f"{text}_loss": loss for text, loss in means.items()},
        **{f"{text}_perplexity": None if loss is None else perplexity(loss) for text, loss in means.items()},
        "trained_parameters": float(learnt.parameters),
        "bytes": float(learnt.bytes),
        "seconds": learnt.seconds,
        "memory": None if learnt.memory is None else float(learnt.memory),
    }
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def tracked_comparison(recipe: CompareRecipe, say: Callable[[str], None]) -> Iterator[ComparisonTracker]:
    """A parent run for the block."""
    tracker = ComparisonTracker.start(recipe, say)
    with ended_with(tracker):
        yield tracker


def _label(learnt: Learnt) -> str:
    if learnt.stage == "before":
        return f"{learnt.model} before"
    return f"{learnt.model} {learnt.method} {learnt.stage} lr {learnt.lr:g} seed {learnt.seed}"


def _flat(recipe: CompareRecipe) -> Iterator[tuple[str, str]]:
    """The recipe as parameters, `section.key` → text; addresses as they may be shown."""
    for section, value in recorded(recipe, exclude_none=True).items():
        for key, item in value.items() if isinstance(value, dict) else ((None, value),):
            yield (section if key is None else f"{section}.{key}"), redact(str(item))[:500]


def summary_numbers(standings: list[dict[str, Any]]) -> dict[str, float]:
    """Of every method on every model, for the parent run."""
    return {f"{each['model']}.{each['method']}.{text}_loss": each["loss"][text] for each in standings for text in TEXTS}
