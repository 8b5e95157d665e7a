"""What an organ sweep leaves behind: tables and summary in the run folder, the report, the same in MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.organ_choice import Choice, Comparison, OrganVerdict
from transplant_ray.evaluate.organ_results import ORGAN_SCHEMA, TASK_SCHEMA, OrganResult, TaskResult, text_columns
from transplant_ray.evaluate.results import OUTCOME_SCHEMA
from transplant_ray.files import write_json
from transplant_ray.organ.grid import Trial
from transplant_ray.pipeline.organ_grid import SIDES, OrganJob
from transplant_ray.pipeline.organ_measuring import EXPORTED, Measuring
from transplant_ray.recipe import DOMAIN, GENERAL
from transplant_ray.report.organs import KIND, build_organ_report, position_figures
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows
from transplant_ray.tracking.organ_sweep import log_chosen, log_models, log_outcome
from transplant_ray.tracking.tracker import Tracker
from transplant_ray.versions import environment


@dataclass(frozen=True)
class Agreement:
    """Of the written checkpoint with the resident model."""

    n: int
    """Blocks of select, of both texts."""
    equal: int
    """Bit for bit."""
    largest: float
    """Difference, in nats a token."""


@dataclass(frozen=True)
class Confirmed:
    """What the test half has shown, and the checkpoint."""

    winner: Trial
    untrained: Trial | None
    """Its control."""
    texts: Mapping[str, Comparison | None]
    """Text → recipient against winner."""
    control: Comparison | None
    """On the domain: untrained against winner."""
    verdict: OrganVerdict | None
    agreement: Agreement | None
    opened: Mapping[str, int]
    """Text or task → how many recipes have looked at its test half under this storage."""


@dataclass(frozen=True)
class OrganSweepResult:
    folder: RunFolder
    results: list[OrganResult]
    tasks: list[TaskResult]
    summary: dict[str, Any]
    refused: tuple[str, ...] = ()
    """What MLflow did not take, each with the reason; all of it is in the folder."""

    @property
    def winner(self) -> OrganResult | None:
        """Its row on select."""
        return next((row for row in self.results if row.winner and row.split == "select"), None)

    @property
    def failed(self) -> list[OrganResult]:
        return [row for row in self.results if row.error is not None]


def record(measured: Measuring, choice: Choice, confirmed: Confirmed | None, tracker: Tracker) -> OrganSweepResult:
    """Write tables, summary and report, and see that MLflow has them."""
    folder, stopwatch = measured.job.folder, measured.stopwatch
    with stopwatch.stage("record"):
        rows, tasks = list(_rows(measured, choice, confirmed)), list(_task_rows(measured, confirmed))
        write_rows(folder.results, [asdict(row) for row in rows], ORGAN_SCHEMA)
        write_rows(folder.tasks, [asdict(row) for row in tasks], TASK_SCHEMA)
        for name, answers in measured.answered.items():
            for split in answers.tallies:
                write_rows(folder.outcomes / f"{name}-{split}.parquet", map(asdict, answers.outcomes(split)), OUTCOME_SCHEMA)
        children = log_models(tracker, rows, tasks)
    summary = summarise(measured, choice, confirmed, rows) | {"mlflow_run": tracker.run_id}
    write_json(folder.summary, summary)
    build_organ_report(folder)
    folder.publish()
    verdict = None if confirmed is None or confirmed.verdict is None else confirmed.verdict
    told = None if verdict is None else (verdict.conclusion, verdict.sentence)
    log_outcome(tracker, _headline(confirmed), position_figures(rows), told, folder)
    version = None
    if confirmed is not None:
        on_test = next((row for row in rows if row.winner and row.split == "test"), None)
        if on_test is not None:
            version = log_chosen(tracker, children[confirmed.winner.label], on_test, tasks, folder)
    tracker.log_files(*organ_reports(folder))
    with stopwatch.stage("send to MLflow"):  # last: all else is in the folder, whatever becomes of the server
        tracker.drain()
    if version is not None and version.exception() is None:
        summary["model_version"] = version.result()
    summary["mlflow_refused"] = list(tracker.refused)
    write_json(folder.summary, summary)
    folder.send(folder.summary)
    tracker.log_files(folder.summary)
    return OrganSweepResult(folder, rows, tasks, summary)


def organ_reports(folder: RunFolder) -> tuple[Any, ...]:
    return *folder.reports, folder.tasks


def summarise(measured: Measuring, choice: Choice, confirmed: Confirmed | None, rows: list[OrganResult]) -> dict[str, Any]:
    job = measured.job
    return {
        "kind": KIND,
        "name": job.recipe.name,
        "recipient": {
            "model": job.recipient.model, "revision": job.recipient.revision, "fingerprint": measured.weights,
            "family": job.recipient.config.model_type, "num_layers": len(job.grid.recipient.insertion.layers),
        },
        "organs": {name: _described(job, name) for name in job.organs},
        "texts": {name: _text(job, name) for name in job.texts},
        "rule": rule(job),
        "most_lost": job.recipe.sweep.most_lost,
        "level": job.recipe.sweep.level,
        "dtype": job.recipe.resources.dtype,
        "winner": choice.winner,
        "vetoed": list(choice.vetoed),
        "confirmed": None if confirmed is None else _confirmation(confirmed),
        "verdict": None if confirmed is None or confirmed.verdict is None else asdict(confirmed.verdict),
        "misfits": [asdict(misfit) for misfit in job.grid.misfits],
        "failed": {row.label: row.error for row in rows if row.error is not None},
        "measured": measured.measured,
        "recalled": measured.recalled,
        "processes": len(measured.processes),
        "seconds": dict(measured.stopwatch.seconds),
        "environment": environment(),
    }  # fmt: skip


def rule(job: OrganJob) -> str:
    """By which the winner was chosen, in words."""
    lost = job.recipe.sweep.most_lost
    veto = "" if lost is None else f", of those that lose at most {lost:g} nats a token on general text against the recipient"
    return f"the smallest mean loss on the select half of the domain text{veto}; the earlier in the grid where two are equal"


def _described(job: OrganJob, name: str) -> dict[str, Any]:
    manifest = job.organs[name].manifest
    return {
        "folder": job.recipe.organs[name],
        "id": manifest.id,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source.model,
        "layers": manifest.layers,
        "num_layers": manifest.num_layers,
        "trained": manifest.training is not None,
        "licence": manifest.licence,
        "without_control": job.grid.without.get(name),
    }


def _text(job: OrganJob, name: str) -> dict[str, Any]:
    """Nothing that it says, but its hash and how much was read."""
    pack, asked = job.texts[name], job.asked[name]
    sides: dict[str, Any] = {
        split: {"blocks": len(asked.examples[split]), "documents": pack.sides[split].documents} for split in SIDES
    }
    spec = getattr(job.recipe, name).model_dump(mode="json")
    return {"sha256": pack.text, "context": pack.context, "spec": spec, **sides}


def _confirmation(confirmed: Confirmed) -> dict[str, Any]:
    return {
        "texts": {name: None if found is None else found.to_json() for name, found in confirmed.texts.items()},
        "untrained": None if confirmed.control is None else confirmed.control.to_json(),
        "exported_agrees": None if confirmed.agreement is None else asdict(confirmed.agreement),
        "test_opened": dict(confirmed.opened),
    }


def _rows(measured: Measuring, choice: Choice, confirmed: Confirmed | None) -> Iterator[OrganResult]:
    for trial in measured.job.grid.trials:
        row = _row(measured, trial, "select", trial.id)
        won = trial.role == "trial" and trial.label == choice.winner
        yield replace(row, winner=won, vetoed=trial.role == "trial" and trial.label in choice.vetoed)
    if confirmed is not None:
        yield _row(measured, measured.job.grid.recipient, "test", measured.job.grid.recipient.id)
        yield replace(_row(measured, confirmed.winner, "test", EXPORTED), winner=True)
        if confirmed.untrained is not None:
            yield _row(measured, confirmed.untrained, "test", confirmed.untrained.id)


def _row(measured: Measuring, trial: Trial, split: Split, variant: str) -> OrganResult:
    tallies = {name: measured.tally(name, split, variant) for name in measured.job.asked}
    columns = {key: value for text in (DOMAIN, GENERAL) for key, value in text_columns(text, tallies[text]).items()}
    error = measured.errors.get((variant, split))
    if error is None and any(tally is None for tally in tallies.values()):
        error = "not all was answered"
    return OrganResult(
        trial.label, trial.id, trial.role, trial.organ, trial.mode, trial.at, split, len(trial.insertion.layers), trial.num_put,
        trial.num_parameters, sum(tally.seconds for tally in tallies.values() if tally is not None), error=error,
        **columns,  # type: ignore[arg-type]
    )  # fmt: skip


def _task_rows(measured: Measuring, confirmed: Confirmed | None) -> Iterator[TaskResult]:
    asked: list[tuple[Trial, Split, str]] = [(trial, "select", trial.id) for trial in measured.job.grid.trials]
    if confirmed is not None:
        recipient = measured.job.grid.recipient
        asked += [(recipient, "test", recipient.id), (confirmed.winner, "test", EXPORTED)]
        asked += [] if confirmed.untrained is None else [(confirmed.untrained, "test", confirmed.untrained.id)]
    for trial, split, variant in asked:
        for name in measured.job.tasks:
            if (tally := measured.tally(name, split, variant)) is not None:
                low, high = tally.interval or (None, None)
                accuracy = None if tally.losses else tally.accuracy
                yield TaskResult(trial.label, trial.id, trial.role, name, split, tally.n, accuracy, tally.loss, low, high)


def _headline(confirmed: Confirmed | None) -> dict[str, float]:
    """Metrics of the parent run."""
    found: dict[str, float] = {}
    for text, compared in {} if confirmed is None else confirmed.texts.items():
        if compared is not None:
            values = {
                "before": compared.before,
                "after": compared.after,
                "low": compared.low,
                "high": compared.high,
                "p": compared.p,
            }
            found |= {f"{text}_{name}": value for name, value in values.items() if value is not None}
    return found
