"""Who goes on is decided by numbers of right answers and by ids alone, so that two runs of a recipe stop the same variants."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transplant_ray.evaluate.race import legs, num_answers, pass_rung, pass_screen
from transplant_ray.recipe import RaceSpec, ScreenSpec

HALVES = RaceSpec(rungs=(50, 100, 200), keep=0.5)


def test_legs_end_at_the_rungs_and_cover_every_example_once() -> None:
    assert legs(300, None) == [slice(0, 300)]
    assert legs(300, HALVES) == [slice(0, 50), slice(50, 100), slice(100, 200), slice(200, 300)]


def test_the_best_half_passes_a_rung_and_ties_go_by_id() -> None:
    assert pass_rung({"d": 3, "c": 3, "b": 1, "a": 3, "e": 0}, HALVES) == {"a", "c", "d"}
    assert pass_rung({"only": 0}, HALVES) == {"only"}
    assert pass_rung({}, HALVES) == set()


@given(st.dictionaries(st.text(min_size=1, max_size=2), st.integers(0, 5)), st.sampled_from([0.1, 0.5, 0.9]))
def test_nobody_who_is_stopped_was_better_than_one_who_passes(correct: dict[str, int], keep: float) -> None:
    passed = pass_rung(correct, RaceSpec(rungs=(1,), keep=keep))
    assert len(passed) == ceil(len(correct) * keep)
    assert passed == pass_rung(dict(reversed(correct.items())), RaceSpec(rungs=(1,), keep=keep))
    assert all((-correct[a], a) < (-correct[b], b) for a in passed for b in correct.keys() - passed)


def test_the_screen_keeps_small_losses_and_a_loss_that_is_no_number_is_last() -> None:
    losses = {"a": None, "b": 2.0, "c": 0.0, "d": 2.0, "e": 3.0}
    assert pass_screen(losses, ScreenSpec(keep=0.2)) == {"c"}
    assert pass_screen(losses, ScreenSpec(keep=0.4)) == {"b", "c"}
    assert pass_screen(losses, ScreenSpec(keep=0.8)) == {"b", "c", "d", "e"}


@pytest.mark.parametrize(
    ("screen", "race", "answers"),
    [
        (None, None, 12 * 300),
        (ScreenSpec(keep=0.25), None, 5 * 300),
        (None, HALVES, 12 * 50 + 7 * 50 + 5 * 100 + 4 * 100),
        (ScreenSpec(keep=0.25), HALVES, 5 * 50 + 4 * 50 + 3 * 100 + 3 * 100),
    ],
)
def test_the_work_is_known_beforehand(screen: ScreenSpec | None, race: RaceSpec | None, answers: int) -> None:
    assert num_answers(10, 2, 300, screen, race) == answers
