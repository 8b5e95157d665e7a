"""One row per planned variant and split; the smallest good trial wins, and never a baseline or a control."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.evaluate.metrics import standard_error, wilson_interval
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import RESULT_SCHEMA, Result, Stopped, choose_winner, make_result
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.tables import read_rows, write_rows

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
MODULES = {
    name: Module(name, i, "mlp.up_proj", Role("ffn", "up"), (4, 6), False, "F32", name, None) for i, name in enumerate(NAMES)
}
TRIAL = Planned("trial", Variant.uniform(NAMES), "lae", "ffn", 2, 1.0)
TARGET, SOURCE = Tally(40, 10, 1.0), Tally(40, 30, 1.0)


def row(**changes: Any) -> Result:
    made = make_result(TRIAL, Tally(40, 20, 1.5, parsed=38, cut_off=3), "select", MODULES, target=TARGET, source=SOURCE)
    return replace(made, **changes)


def trial(k: int, accuracy: float | None, parameters: int = 100, variant: str = "v", n: int = 100) -> Result:
    error = None if accuracy is None else standard_error(accuracy, n)
    return row(
        k=k, size=float(k), accuracy=accuracy, worth=accuracy, worth_error=error, num_parameters=parameters, variant=variant, n=n
    )


def test_a_row_holds_the_point_and_its_metrics() -> None:
    low, high = wilson_interval(20, 40)
    assert asdict(row()) == {
        "variant": TRIAL.variant.id, "role": "trial", "ranker": "lae", "kind": "ffn", "k": 2, "alpha": 1.0, "seed": None,
        "split": "select", "n": 40, "correct": 20, "accuracy": 0.5, "ci_low": low, "ci_high": high, "tir": 2.0, "recovery": 0.5,
        "num_modules": 2, "num_parameters": 48, "seconds": 1.5, "winner": False, "error": None,
        "loss": None, "stopped": None, "channels": None, "penalty": None, "size": 2.0, "parsed": 38, "cut_off": 3, "moved": None,
        "kl": None, "guard_share": None, "score": 0.5, "worth": 0.5, "worth_error": standard_error(0.5, 40), "vetoed_by": None,
    }  # fmt: skip
    assert row().label == "lae ffn k=2" == TRIAL.label


@pytest.mark.parametrize("why", ["raced", "screened"])
def test_a_trial_that_was_stopped_early_cannot_win(why: Stopped) -> None:
    lucky = replace(row(), correct=5, n=5, accuracy=1.0, stopped=why)
    assert choose_winner([lucky, row()]) == row()
    assert choose_winner([lucky]) is None


METRICS = ("correct", "accuracy", "ci_low", "ci_high", "tir", "recovery", "parsed", "worth")


@pytest.mark.parametrize("tally", [Tally(40, 20, 1.5, "RuntimeError: out of memory"), Tally(0, 0, 0.1), Tally(0, 0, 0.1, "gone")])
def test_a_failed_trial_is_a_row_with_its_reason_never_a_number(tally: Tally) -> None:
    made = make_result(TRIAL, tally, "test", MODULES, target=TARGET, source=SOURCE)
    assert {name: getattr(made, name) for name in METRICS} == dict.fromkeys(METRICS)
    assert (made.error, made.n, made.seconds, made.split) == (tally.error, tally.n, tally.seconds, "test")
    assert choose_winner([made]) is None


@pytest.mark.parametrize(
    ("target", "source", "tir", "recovery"),
    [
        (None, SOURCE, None, None),
        (TARGET, None, 2.0, None),
        (Tally(40, 0, 1.0), SOURCE, None, 20 / 30),
        (TARGET, TARGET, 2.0, None),
    ],
)
def test_what_a_baseline_leaves_undefined_is_none(
    target: Tally | None, source: Tally | None, tir: float | None, recovery: float | None
) -> None:
    made = make_result(TRIAL, Tally(40, 20, 1.0), "select", MODULES, target=target, source=source)
    assert made.accuracy == 0.5
    assert made.tir == tir
    assert made.recovery == (None if recovery is None else pytest.approx(recovery))


def test_baselines_are_known_by_their_role() -> None:
    source = make_result(Planned("source", ORIGIN), SOURCE, "select", MODULES, target=TARGET, source=SOURCE)
    assert (source.variant, source.label, source.num_modules, source.recovery) == ("source", "source", 0, 1.0)
    target = make_result(Planned("target", ORIGIN), TARGET, "select", MODULES, target=TARGET, source=SOURCE)
    assert (target.variant, target.label, target.tir, target.recovery) == (ORIGIN.id, "target", 1.0, 0.0)


def test_the_table_has_a_column_for_every_field_and_gives_the_rows_back(tmp_path: Path) -> None:
    assert RESULT_SCHEMA.names == [field.name for field in fields(Result)]
    rows = [row(), row(error="gone", accuracy=None, correct=None), row(role="control", seed=2, alpha=0.25, winner=True)]
    write_rows(tmp_path / "results.parquet", [asdict(each) for each in rows], RESULT_SCHEMA)
    assert [Result(**read) for read in read_rows(tmp_path / "results.parquet")] == rows


def test_nothing_is_cut_off_where_nothing_is_decoded() -> None:
    made = make_result(TRIAL, Tally(40, 20, 1.0, cut_off=20), "select", MODULES, target=TARGET, source=SOURCE, decoded=False)
    assert made.cut_off is None


# The winner.


def test_a_vetoed_trial_neither_wins_nor_raises_the_bar() -> None:
    best, good = replace(trial(2, 0.9), vetoed_by="reversal"), trial(4, 0.5)
    assert choose_winner([best, good]) is good
    assert choose_winner([best]) is None


def test_trials_are_chosen_by_what_they_are_worth() -> None:
    dear, cheap = replace(trial(4, 0.9), worth=0.3), replace(trial(4, 0.6), worth=0.6)
    assert choose_winner([dear, cheap]) is cheap


def test_the_smallest_k_within_one_standard_error_wins() -> None:
    close, far = 0.5 - standard_error(0.5, 100) + 1e-9, 0.5 - standard_error(0.5, 100) - 1e-9
    results = [trial(1, far), trial(2, close), trial(8, 0.5), trial(16, 0.49)]
    assert choose_winner(results) is results[1]


def test_exactly_one_standard_error_is_within_it() -> None:
    results = [trial(1, 0.25, n=4), trial(2, 0.5, n=4)]  # the error of 2 in 4 is 1/4, in floating point too
    assert choose_winner(results) is results[0]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_at_both_ends_only_the_best_are_close(accuracy: float) -> None:
    results = [trial(8, accuracy), trial(4, accuracy), trial(1, max(0.0, accuracy - 0.01))]
    winner = choose_winner(results)
    assert winner is results[1 if accuracy else 2]


def test_among_equal_k_the_fewest_parameters_win_then_accuracy_then_the_id() -> None:
    few, many = trial(4, 0.49, parameters=10), trial(4, 0.5, parameters=20)
    assert choose_winner([many, few]) is few
    better, worse = trial(4, 0.5), trial(4, 0.49)
    assert choose_winner([worse, better]) is better
    first, second = trial(4, 0.5, variant="a"), trial(4, 0.5, variant="b")
    assert choose_winner([second, first]) is first


@pytest.mark.parametrize("role", ["target", "source", "all", "control"])
def test_only_a_trial_can_win(role: str) -> None:
    other = row(role=role, accuracy=1.0, worth=1.0, k=1, size=1.0)
    assert choose_winner([other]) is None
    poor = trial(9, 0.01)
    assert choose_winner([other, poor]) is poor  # nor does it raise the bar


def test_failed_trials_neither_win_nor_stop_others() -> None:
    good = trial(8, 0.5)
    assert choose_winner([trial(1, None), good, trial(2, None)]) is good
    assert choose_winner([trial(1, None)]) is None
    assert choose_winner([]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 50), st.integers(1, 3)), min_size=1, max_size=12), st.randoms())
def test_the_winner_is_close_to_the_best_and_no_smaller_trial_is(points: Any, rng: Any) -> None:
    trials = [trial(k, correct / 50, size, f"v{i}", n=50) for i, (k, correct, size) in enumerate(points)]
    winner = choose_winner(trials)
    assert winner is not None
    best = max(t.accuracy for t in trials)
    close = [t for t in trials if t.accuracy >= best - standard_error(best, 50)]
    assert winner in close
    assert winner.k == min(t.k for t in close)
    assert winner.num_parameters == min(t.num_parameters for t in close if t.k == winner.k)
    assert choose_winner(rng.sample(trials, len(trials))) == winner
