"""A variant that fails at a guard is a failed row with the guard's name in it: it counts, and never wins."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import Result, choose_winner, make_result
from transplant_ray.graft.plan import Planned, SweepPlan
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.pipeline import arms as pipeline_arms
from transplant_ray.pipeline.arms import evaluate_arms
from transplant_ray.pipeline.guarding import with_guards
from transplant_ray.pipeline.recording import SweepResult, describe_failures
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import MAIN, ObjectiveSpec
from transplant_ray.storage import RunFolder

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
MODULES = {
    name: Module(name, i, "mlp.up_proj", Role("ffn", "up"), (4, 6), False, "F32", name, None) for i, name in enumerate(NAMES)
}
BEST, GOOD, MERGED = (Planned("trial", Variant.uniform(NAMES[:1], alpha), "lae", "ffn", 1, alpha) for alpha in (1.0, 0.5, 0.25))
RIGHT, HALF = Tally(100, 90, 1.0), Tally(100, 50, 1.0)
FAILED = Tally(0, 0, 0.1, "NumericsError: NaN logits")
EXAMPLES = {"select": range(100), "test": range(100)}
Tallies = Mapping[tuple[str, str], Tally]
"""By task and variant; all of select."""


def make_run(tallies: Tallies, objective: ObjectiveSpec | None = None) -> Run:
    guards = {name: SimpleNamespace(margin=0.1) for name in ("one", "held")}
    recipe = SimpleNamespace(
        sweep=SimpleNamespace(objective=objective), guards=SimpleNamespace(tasks=guards, choosing=("one",), spared="held")
    )
    tasks = {name: SimpleNamespace(examples=EXAMPLES) for name in (MAIN, *guards)}
    job = SimpleNamespace(tasks=tasks, guards={name: tasks[name] for name in guards}, recipe=recipe)
    run = SimpleNamespace(
        job=job, modules=MODULES, tally=lambda task, split, who: tallies.get((task, who)) if split == "select" else None
    )
    return cast(Run, run)


def everybody(**changes: Tally) -> dict[tuple[str, str], Tally]:
    """The best trial is right more often than the other; both keep both guards, apart from changes of the best."""
    known = {(task, who): HALF for task in (MAIN, "one", "held") for who in (ORIGIN.id, BEST.id, GOOD.id)}
    return known | {(MAIN, BEST.id): RIGHT} | {(task, BEST.id): tally for task, tally in changes.items()}


def rows(run: Run) -> list[Result]:
    made = []
    for entry in (BEST, GOOD):
        tally = run.tally(MAIN, "select", entry.id)
        assert tally is not None
        row = make_result(entry, tally, "select", MODULES, target=HALF, source=RIGHT)
        made.append(with_guards(run, row, entry, entry.id))
    return made


OBJECTIVES = pytest.mark.parametrize("objective", [None, ObjectiveSpec(price=0.5)])


@OBJECTIVES
def test_nothing_failed_and_the_best_wins(objective: ObjectiveSpec | None) -> None:
    best, good = rows(make_run(everybody(), objective))
    assert best.error is good.error is None
    assert choose_winner([best, good]) is best


@OBJECTIVES
@pytest.mark.parametrize("guard", ["one", "held"])
def test_a_trial_that_fails_at_a_guard_says_at_which_and_cannot_win(guard: str, objective: ObjectiveSpec | None) -> None:
    best, good = rows(make_run(everybody(**{guard: FAILED}), objective))
    assert best.error == f"guard {guard}: NumericsError: NaN logits"
    assert (best.accuracy, best.score, best.guard_share) == (0.9, 0.9, 1.0)  # what was measured stays
    assert best.worth is best.worth_error is None
    assert good.error is None
    assert choose_winner([best, good]) is good
    assert choose_winner([best]) is None


def test_every_guard_that_fails_is_named_unless_the_task_itself_failed() -> None:
    best, _ = rows(make_run(everybody(one=FAILED, held=replace(FAILED, error="gone"))))
    assert best.error == "guard one: NumericsError: NaN logits; guard held: gone"
    best, _ = rows(make_run(everybody(**{MAIN: FAILED, "one": FAILED})))
    assert best.error == "NumericsError: NaN logits"


@pytest.mark.parametrize("role", ["target", "source", "all", "control"])
def test_so_do_baselines_and_controls(role: Any) -> None:
    entry = Planned(role, BEST.variant)
    run = make_run({(MAIN, entry.id): HALF, ("one", entry.id): FAILED})
    row = make_result(entry, HALF, "select", MODULES, target=HALF, source=RIGHT)
    assert with_guards(run, row, entry, entry.id).error == "guard one: NumericsError: NaN logits"


def summarised(run: Run, arms: tuple[tuple[Planned, ...], ...] = (), **searches: str) -> SweepResult:
    results = rows(run)
    failed = describe_failures(run, SweepPlan((), (), arms), results)
    return SweepResult(RunFolder(Path()), results, {"failed": failed, "failed_searches": searches})


def test_where_nothing_failed_nothing_is_counted() -> None:
    assert summarised(make_run(everybody()), ((BEST, GOOD), (MERGED,))).failed == []


def test_a_failed_guard_counts() -> None:
    (failed,) = summarised(make_run(everybody(held=FAILED))).failed
    assert failed == {"variant": BEST.id, "label": BEST.label, "error": "guard held: NumericsError: NaN logits"}


def test_a_set_of_an_arm_that_failed_counts_once_and_one_that_has_a_row_not_again() -> None:
    run = make_run(everybody(one=FAILED) | {(MAIN, MERGED.id): FAILED})
    failed = summarised(run, ((BEST, MERGED), (MERGED, GOOD))).failed
    assert [(one["variant"], one["error"]) for one in failed] == [
        (BEST.id, "guard one: NumericsError: NaN logits"),
        (MERGED.id, "NumericsError: NaN logits"),
    ]


def test_a_search_that_failed_counts_with_its_reason() -> None:
    failed = summarised(make_run(everybody()), gates="NumericsError: the loss is NaN").failed
    assert failed == [{"label": "search gates", "error": "NumericsError: the loss is NaN"}]


def test_of_a_set_that_failed_a_user_is_told_even_where_its_arm_chose_another(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    run = cast(Any, make_run(everybody() | {(MAIN, MERGED.id): FAILED}))
    run.stopwatch = SimpleNamespace(watch=SimpleNamespace(note=told.append), stage=lambda *_: nullcontext())
    run.job.examples, run.answers = EXAMPLES, SimpleNamespace(tallies={"test": {GOOD.id: HALF}})
    monkeypatch.setattr(pipeline_arms, "ask", lambda *_: None)
    assert evaluate_arms(run, [(GOOD, MERGED)], cast(Any, None)).scores == (0.5,)
    assert told == ["arms: random sets that failed: 1, the first with NumericsError: NaN logits"]
