"""The formulas, against hand values and an independent Wilson interval; `test_paper_tables` has the paper's rows."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm

from transplant_ray.evaluate.metrics import crossed_interval, reachable_recovery, recovery, standard_error, tir, wilson_interval

ACCURACIES = st.integers(0, 300).map(lambda correct: correct / 300)


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


def test_where_blocks_agree_or_there_is_one_the_interval_is_that_over_seeds() -> None:
    means = np.array([[0.1], [0.3], [0.2]])
    expected = stats.t.interval(0.95, 2, means.mean(), stats.sem(means[:, 0]))
    assert crossed_interval(means.tolist()) == pytest.approx(expected)
    assert crossed_interval(np.repeat(means, 9, axis=1).tolist()) == pytest.approx(expected)
    assert crossed_interval([[0.1, 0.2]]) is None


def test_where_seeds_agree_the_interval_is_that_over_blocks() -> None:
    blocks = np.random.default_rng(0).normal(size=40)
    expected = stats.t.interval(0.95, 39, blocks.mean(), stats.sem(blocks))
    assert crossed_interval([blocks.tolist()] * 3) == pytest.approx(expected)


@pytest.mark.parametrize(("of_seeds", "of_blocks"), [(0.0, 1.0), (0.05, 1.0), (0.2, 1.0), (1.0, 1.0), (1.0, 0.0)])
def test_it_holds_the_truth_as_often_as_it_says_whatever_decides(of_seeds: float, of_blocks: float) -> None:
    """Three seeds on 40 blocks, 600 times; an interval over seeds alone would hold it in 46 % where seeds agree."""
    draw = np.random.default_rng(7)
    held = 0
    for _ in range(600):
        values = draw.normal(0, of_seeds, (3, 1)) + draw.normal(0, of_blocks, (1, 40)) + draw.normal(0, 0.3, (3, 40))
        low, high = crossed_interval(values.tolist()) or (0.0, 0.0)
        held += low <= 0 <= high
    assert held >= stats.binom(600, 0.95).ppf(0.001)
