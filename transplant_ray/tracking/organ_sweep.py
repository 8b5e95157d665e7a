"""What MLflow gets of an organ sweep: a child run per model, with the same parent, winner and versions as a transplant's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from matplotlib.figure import Figure
from mlflow.entities import Metric, Param

from transplant_ray.evaluate.organ_results import OrganResult, TaskResult
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.tracker import Tracker, milliseconds

PARAMS = ("role", "organ", "mode", "at", "variant")
METRICS = (
    "domain_loss", "domain_perplexity", "domain_n", "general_loss", "general_perplexity", "general_n", "num_layers", "num_put",
    "num_parameters", "seconds",
)  # fmt: skip


def log_models(tracker: Tracker, rows: Sequence[OrganResult], tasks: Sequence[TaskResult]) -> dict[str, Future[str]]:
    """A child run for every row on select; label → its id, once it has one."""
    return {
        row.label: tracker.log_child(
            row.label,
            row.variant,
            [Param(name, str(value)) for name in PARAMS if (value := getattr(row, name)) is not None],
            _metrics(row, tasks),
            {key: value for key, value in (("error", row.error), ("vetoed", "true" if row.vetoed else None)) if value},
            {"organ": row.organ, "mode": row.mode, "at": row.at, "role": row.role},
        )
        for row in rows
        if row.split == "select"
    }


def log_outcome(
    tracker: Tracker,
    headline: Mapping[str, float],
    figures: Mapping[str, Figure],
    verdict: tuple[str, str] | None,
    folder: RunFolder,
) -> None:
    tracker.log_headline(headline, figures, verdict)
    tracker.log_files(folder.results)


def log_chosen(
    tracker: Tracker, child: Future[str], row: OrganResult, tasks: Sequence[TaskResult], folder: RunFolder
) -> Future[str | None]:
    """`row` is the winner's on test. The version of the registered model, where there is one."""
    return tracker.log_best(child, _metrics(row, tasks), folder)


def _metrics(row: OrganResult, tasks: Sequence[TaskResult]) -> list[Metric]:
    now = milliseconds()
    values = {name: getattr(row, name) for name in METRICS}
    for task in tasks:
        if (task.label, task.split) == (row.label, row.split):
            values[f"{task.task}_{'loss' if task.accuracy is None else 'accuracy'}"] = (
                task.loss if task.accuracy is None else task.accuracy
            )
    return [Metric(name, float(value), now, 0) for name, value in values.items() if value is not None]
