"""The rule by which winners and arms are chosen: small sets within one standard error of the best, and what guards cost them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.evaluate.choosing import Candidate, Guarded, choose, weigh
from transplant_ray.evaluate.metrics import standard_error
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.recipe import ObjectiveSpec

N = 100


def candidate(worth: float, size: float = 4, parameters: int = 10, vetoed_by: str | None = None) -> Candidate:
    return Candidate(worth, standard_error(worth, N), size, parameters, vetoed_by)


def guarded(before: int, after: int, name: str = "reversal", margin: float = 0.05) -> Guarded:
    return Guarded(name, Tally(N, before, 1.0), Tally(N, after, 1.0), margin)


def test_the_smallest_within_one_standard_error_then_the_fewest_parameters_then_the_better_then_the_first() -> None:
    close, far = 0.5 - standard_error(0.5, N) + 1e-9, 0.5 - standard_error(0.5, N) - 1e-9
    assert choose([candidate(0.5, 8), candidate(far, 1), candidate(close, 2), candidate(0.49, 16)]) == 2
    assert choose([candidate(0.5, parameters=20), candidate(0.49, parameters=10)]) == 1
    assert choose([candidate(0.49), candidate(0.5)]) == 1
    assert choose([candidate(0.5), candidate(0.5)]) == 0
    assert choose([]) is None


def test_the_vetoed_neither_win_nor_raise_the_bar() -> None:
    assert choose([candidate(0.9, 1, vetoed_by="x"), candidate(0.3, 8), candidate(0.28, 4)]) == 2
    assert choose([candidate(0.9, vetoed_by="x")]) is None


def test_without_an_objective_guards_have_no_say() -> None:
    found = weigh(Tally(N, 60, 1.0), [guarded(90, 0)], None, 3.5, 7)
    assert found == Candidate(0.6, standard_error(0.6, N), 3.5, 7)


def test_a_price_takes_away_the_mean_loss_and_a_gain_pays_nothing() -> None:
    guards = [guarded(90, 70), guarded(50, 80, "sorting")]
    found = weigh(Tally(N, 60, 1.0), guards, ObjectiveSpec(price=0.5), 1, 1)
    assert found.worth == pytest.approx(0.6 - 0.5 * (0.2 + 0) / 2)
    assert found.error == pytest.approx((standard_error(0.6, N) ** 2 + (0.25 * standard_error(0.7, N)) ** 2) ** 0.5)
    assert found.vetoed_by is None


@pytest.mark.parametrize(("after", "vetoed_by"), [(85, None), (84, "reversal"), (95, None)])
def test_a_veto_is_for_losses_over_the_margin(after: int, vetoed_by: str | None) -> None:
    found = weigh(Tally(N, 60, 1.0), [guarded(90, after)], ObjectiveSpec(veto=True), 1, 1)
    assert (found.vetoed_by, found.worth) == (vetoed_by, 0.6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9), st.booleans()), min_size=1, max_size=10))
def test_no_smaller_one_is_as_close_to_the_best_that_is_left(points: list[tuple[float, float, bool]]) -> None:
    candidates = [replace(candidate(worth, size), vetoed_by="x" if vetoed else None) for worth, size, vetoed in points]
    left = [each for each in candidates if each.vetoed_by is None]
    place = choose(candidates)
    assert (place is None) == (not left)
    if place is not None:
        best = max(left, key=lambda each: each.worth)
        close = [each for each in left if each.worth >= best.worth - best.error]
        assert candidates[place] in close
        assert candidates[place].size == min(each.size for each in close)
