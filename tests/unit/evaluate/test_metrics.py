"""The formulas, against hand values, an independent Wilson interval, and the rows of the paper's table (method.md)."""

from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from transplant_ray.evaluate.metrics import reachable_recovery, recovery, standard_error, tir, wilson_interval

PAPER = [  # target, source, after, TIR, Recovery, as printed: accuracies and Recovery in percent
    (6, 8, 12, 2.00, 300),
    (16, 20, 20, 1.25, 100),
    (16, 30, 26, 1.63, 71.4),
    (34, 34, 36, 1.06, None),
    (36, 40, 40, 1.11, 100),
    (6, 10, 10, 1.67, 100),
    (8, 8, 8, 1.00, None),
    (6, 22, 10, 1.67, 25.0),
    (6, 36, 12, 2.00, 20.0),
    (6, 30, 14, 2.33, 33.3),
]
ACCURACIES = st.integers(0, 300).map(lambda correct: correct / 300)


@pytest.mark.parametrize(("target", "source", "after", "ratio", "closed"), PAPER)
def test_the_papers_rows_come_out(target: float, source: float, after: float, ratio: float, closed: float | None) -> None:
    found = tir(after / 100, target=target / 100)
    assert found is not None
    assert abs(found - ratio) <= 0.005 + 1e-9  # printed with two decimals; 1.625 is 1.63 there
    share = recovery(after / 100, target=target / 100, source=source / 100)
    assert (None if share is None else round(100 * share, 1)) == closed


@settings(max_examples=30, deadline=None)
@given(ACCURACIES, ACCURACIES)
def test_recovery_is_0_at_the_target_and_1_at_the_source_and_undefined_without_a_gap(target: float, source: float) -> None:
    ends = (recovery(target, target=target, source=source), recovery(source, target=target, source=source))
    assert ends == ((None, None) if target == source else (0.0, 1.0))
    assert (reachable_recovery(source, target=target, all_swapped=source) is None) == (source == target)


@settings(max_examples=30, deadline=None)
@given(ACCURACIES)
def test_tir_is_undefined_at_zero_and_1_at_the_target(target: float) -> None:
    assert tir(target, target=target) == (None if target == 0 else 1.0)


def test_harm_is_negative_recovery_even_where_the_source_is_worse() -> None:
    assert recovery(0.1, target=0.2, source=0.6) == pytest.approx(-0.25)
    assert recovery(0.3, target=0.2, source=0.1) == pytest.approx(-1)
    assert reachable_recovery(0.4, target=0.2, all_swapped=0.6) == pytest.approx(0.5)


def by_hand(correct: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson 1927: the roots of (p − p̂)² = z²·p(1 − p)/n."""
    z = norm.ppf(0.5 + confidence / 2)
    share = correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return middle - half, middle + half


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_wilsons(counts: tuple[int, int], confidence: float) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n, confidence)
    assert (low, high) == pytest.approx(by_hand(correct, n, confidence), abs=1e-9)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high


def test_an_interval_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="n"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(("accuracy", "n", "expected"), [(0.5, 100, 0.05), (0.0, 10, 0.0), (1.0, 10, 0.0), (0.2, 400, 0.02)])
def test_the_standard_error_of_a_proportion(accuracy: float, n: int, expected: float) -> None:
    assert standard_error(accuracy, n) == pytest.approx(expected)
