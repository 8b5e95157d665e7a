"""What a sweep leaves behind: tables and summary in the run folder, the same in MLflow."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transplant_ray.distributed.probing import ProbeResult
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.metrics import reachable_recovery
from transplant_ray.evaluate.prepared import SPLITS
from transplant_ray.evaluate.results import EXAMPLE_SCHEMA, GUARD_SCHEMA, OUTCOME_SCHEMA, RESULT_SCHEMA, GuardResult, Result
from transplant_ray.evaluate.significance import compare
from transplant_ray.files import write_json
from transplant_ray.graft.merges import planned_merges
from transplant_ray.graft.plan import SweepPlan
from transplant_ray.graft.variant import VARIANT_SCHEMA, variant_rows
from transplant_ray.pipeline.arms import failed_sets
from transplant_ray.pipeline.evaluating import Evaluation
from transplant_ray.pipeline.exporting import write_winner_card
from transplant_ray.pipeline.guarding import guard_rows
from transplant_ray.pipeline.judging import EXPORTED, describe, intervals, judge_sweep
from transplant_ray.pipeline.run import Run
from transplant_ray.pipeline.searching import describe_searches
from transplant_ray.probe.agreement import compare_rankings, spearman_with_depth, stability
from transplant_ray.probe.rankers import Ranking
from transplant_ray.recipe import MAIN
from transplant_ray.report.build import build_report
from transplant_ray.report.figures import tracking_figures
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows
from transplant_ray.tracking.tracker import Tracker
from transplant_ray.versions import environment


@dataclass(frozen=True)
class SweepResult:
    folder: RunFolder
    results: list[Result]
    summary: dict[str, Any]
    refused: tuple[str, ...] = ()
    """What MLflow did not take, each with the reason; all of it is in the folder."""

    @property
    def winner(self) -> Result | None:
        """The winner's row on select."""
        return next((row for row in self.results if row.winner and row.split == "select"), None)

    @property
    def failed(self) -> list[dict[str, str]]:
        """Variants and searches that failed: what each is called, and its `error`."""
        searches = [{"label": f"search {name}", "error": why} for name, why in self.summary["failed_searches"].items()]
        return [*self.summary["failed"], *searches]


def record(run: Run, evaluation: Evaluation, results: list[Result], probed: ProbeResult, tracker: Tracker) -> SweepResult:
    """Write tables, summary, the winner's card and the report, and see that MLflow has them; returns what was recorded."""
    folder = run.folder
    with run.stopwatch.stage("record"):
        guards = _guards(evaluation, results)
        _write_tables(run, evaluation.plan, results, guards)
        winner = [row for row in results if row.winner]
        if winner:
            variant = evaluation.plan.trial(winner[0].label).variant
            write_winner_card(run.job.recipe, run.job.comparison, variant, winner, folder)
        verdict = judge_sweep(evaluation, next(iter(winner), None))
        summary = summarise(evaluation, results, probed, tracker.run_id) | {
            "rows_per_step": evaluation.rows_per_step,
            "test_opened": evaluation.test_opened.get(MAIN, 0),
            "guard_tests_opened": {name: n for name, n in evaluation.test_opened.items() if name != MAIN},
            "searches": describe_searches(probed.found),
            "failed_searches": dict(probed.failed),
            "verdict": None if verdict is None else describe(verdict, evaluation),
            "guards": [asdict(row) for row in guards if row.winner or row.role in ("target", "source", "all")],
        }
        write_json(folder.summary, summary)
        shutil.rmtree(folder.tune, ignore_errors=True)  # all of it is in the tables
        folder.publish()
        tracker.log_summary(folder, _headline(results), tracking_figures(folder), verdict)
        version = tracker.log_winner(evaluation.reported[winner[0].label].run, winner[-1], folder) if winner else None
    summary["seconds"] = dict(run.stopwatch.seconds)  # as the report has them: waiting for MLflow comes after it
    write_json(folder.summary, summary)
    try:
        build_report(folder)
    except Exception:  # `report` makes it again, and everything else is kept
        tracker.drain()
        raise
    folder.send(folder.summary, *folder.reports)
    tracker.log_files(*folder.reports)
    with run.stopwatch.stage("send to MLflow"):  # last: all else is in the folder, whatever becomes of the server
        tracker.drain()
    if version is not None and version.exception() is None:
        summary["model_version"] = version.result()
    summary["mlflow_refused"] = list(tracker.refused)
    write_json(folder.summary, summary)
    folder.send(folder.summary)
    tracker.log_files(folder.summary)
    return SweepResult(folder, results, summary)


def _write_tables(run: Run, plan: SweepPlan, results: Sequence[Result], guards: Sequence[GuardResult]) -> None:
    folder = run.folder
    for name, answers in run.answered.items():
        for split in answers.tallies:
            stem = split if name == MAIN else f"guard-{name}-{split}"
            write_rows(folder.outcomes / f"{stem}.parquet", map(asdict, answers.outcomes(split)), OUTCOME_SCHEMA)
    write_rows(folder.examples, list(_examples(run)), EXAMPLE_SCHEMA)
    write_rows(folder.variants, list(variant_rows(plan.variants)), VARIANT_SCHEMA)
    write_rows(folder.results, [asdict(row) for row in results], RESULT_SCHEMA)
    write_rows(folder.guards, [asdict(row) for row in guards], GUARD_SCHEMA)


def _examples(run: Run) -> Iterator[dict[str, str]]:
    """What was asked, so that completions can be read."""
    for name, task in run.job.tasks.items():
        for split in SPLITS:
            for e in task.examples[split]:
                yield {"task": name, "split": split, "example": e.id, "prompt": task.prompts[e.id], "answer": e.answer}


def _guards(evaluation: Evaluation, results: Sequence[Result]) -> list[GuardResult]:
    """Every variant on select; on test the baselines, and the winner as its exported checkpoint."""
    run = evaluation.run
    planned = (*planned_merges(run.job.recipe.sweep.controls), *evaluation.plan.entries)
    entries = {(entry.role, entry.label): entry for entry in planned}
    rows = []
    for result in results:
        entry = entries[result.role, result.label]
        name = EXPORTED if result.winner and result.split == "test" else entry.id
        rows += [replace(row, winner=result.winner) for row in guard_rows(run, entry, result.split, name)]
    return rows


def summarise(evaluation: Evaluation, results: Sequence[Result], probed: ProbeResult, run_id: str) -> dict[str, Any]:
    """`summary.json`."""
    run = evaluation.run
    by_split: dict[Split, dict[str, Any]] = {split: _baselines(results, split) for split in ("select", "test")}
    winner = [row for row in results if row.winner]
    return {
        "name": run.job.recipe.name,
        "recipe": run.job.recipe.identity(),
        "baselines": by_split,
        "winner": _describe_winner(evaluation, results, winner) if winner else None,
        "failed": describe_failures(run, evaluation.plan, results),
        "vetoed": sorted(row.label for row in results if row.role == "trial" and row.vetoed_by),
        "stopped": dict(Counter(row.stopped for row in results if row.stopped)),
        "close": _close(run),
        "recalled": 0 if run.memory is None else run.memory.ledger.num_recalled,
        "unjudged": {split: _num_unjudged(run, split) for split in ("select", "test")},
        "rankings": _rankings(run, probed.rankings),
        "warnings": list(run.job.comparison.warnings),
        "excluded": [asdict(exclusion) for exclusion in run.job.comparison.excluded],
        "places": probed.places,
        "mlflow_run": run_id,
        "environment": environment(),
        "seconds": run.stopwatch.seconds,
    }


def describe_failures(run: Run, plan: SweepPlan, results: Sequence[Result]) -> list[dict[str, str]]:
    """Rows that failed; and what else failed among the random sets of arms, which have none."""
    rows = [(row.variant, row.label, row.error) for row in results if row.error]
    known = {variant for variant, *_ in rows}
    sets = [(entry.id, entry.label, error) for entry, error in failed_sets(run, plan.arms) if entry.id not in known]
    return [dict(zip(("variant", "label", "error"), told, strict=True)) for told in (*rows, *sets)]


def _rankings(run: Run, rankings: Sequence[Ranking]) -> dict[str, Any]:
    """What each ranking cost, and how far it can be relied on."""
    modules, recipe = run.job.comparison.modules, run.job.recipe
    by_ranker = {}
    for ranking in rankings:
        steady = stability(ranking, modules, recipe.sweep.k, recipe.task.split.seed)
        by_ranker[ranking.ranker] = {
            "cost": asdict(ranking.measured.cost) if ranking.measured else None,
            "spearman_with_depth": spearman_with_depth(ranking, modules),
            "stability": asdict(steady) if steady else None,
        }
    return {"by_ranker": by_ranker, "agreement": [asdict(pair) for pair in compare_rankings(rankings, recipe.sweep.k)]}


def _describe_matched(evaluation: Evaluation) -> dict[str, Any] | None:
    """The merge that moves as much as the winner, against it on test where that was opened."""
    matched, run = evaluation.matched, evaluation.run
    if matched is None:
        return None
    theirs, ours = (run.scores(MAIN, "test", name) for name in (matched.id, EXPORTED))
    test = _numbers(evaluation.row(matched, "test")) if evaluation.test_opened else None
    return {"label": matched.label, "test": test, "p": None if theirs is None or ours is None else compare(theirs, ours).p}


def _describe_winner(evaluation: Evaluation, results: Sequence[Result], winner: Sequence[Result]) -> dict[str, Any]:
    run = evaluation.run
    first = winner[0]
    described: dict[str, Any] = {"variant": first.variant, "label": first.label, "num_modules": first.num_modules}
    for row in winner:
        target, all_swapped = (_score(results, role, row.split) for role in ("target", "all"))
        reachable = None
        if row.score is not None and target is not None and all_swapped is not None:
            reachable = reachable_recovery(row.score, target=target, all_swapped=all_swapped)
        described[row.split] = {**_numbers(row), "reachable_recovery": reachable}
    if "test" in described:
        described["test"]["intervals"] = intervals(run)
    controls = [row for row in results if row.role == "control" and row.split == "select" and row.score is not None]
    best = max(controls, key=lambda row: row.score or 0, default=None)
    described["best_control"] = None if best is None else {"label": best.label, **_numbers(best)}
    described["same_as"] = [row.label for row in controls if row.variant == first.variant]
    described["matched"] = _describe_matched(evaluation)
    described["exported_agrees"] = _agreement(run, first.variant)
    return described


def _agreement(run: Run, variant: str) -> dict[str, int]:
    """On how many select examples the reloaded checkpoint gave the very completion of the resident variant."""
    resident, exported = (run.answers.completions("select", name) for name in (variant, EXPORTED))
    return {"n": len(resident), "equal": sum(exported.get(example) == text for example, text in resident.items())}


def _num_unjudged(run: Run, split: Split) -> int:
    """Answers to the task and the guards that no scorer could judge."""
    return sum(o.error is not None for answers in run.answered.values() for o in answers.outcomes(split))


def _close(run: Run) -> dict[str, int]:
    """Of the answers on select, those with a step at which rounding may have decided."""
    close = [outcome.num_close > 0 for outcome in run.answers.outcomes("select")]
    return {"n": len(close), "close": sum(close)}


def _baselines(results: Sequence[Result], split: Split) -> dict[str, Any]:
    return {row.role: _numbers(row) for row in results if row.split == split and row.role in ("target", "source", "all")}


def _score(results: Sequence[Result], role: str, split: Split) -> float | None:
    return next((row.score for row in results if (row.role, row.split) == (role, split)), None)


def _numbers(row: Result) -> dict[str, Any]:
    names = ("n", "correct", "accuracy", "loss", "score", "ci_low", "ci_high", "tir", "recovery", "kl", "guard_share")
    return {name: getattr(row, name) for name in names}


def _headline(results: Sequence[Result]) -> dict[str, float]:
    """Metrics of the parent run: accuracies, or losses, of baselines and winner on both splits."""
    rows = [row for row in results if row.score is not None and (row.winner or row.role in ("target", "source", "all"))]
    return {f"{row.split}_{'winner' if row.winner else row.role}": row.value for row in rows if row.value is not None}
