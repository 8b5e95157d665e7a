"""Losses: held against scipy and statsmodels, and against what a test of 5 % should do on losses that are far from normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, ttest_1samp, ttest_rel
from statsmodels.stats.power import TTestPower  # type: ignore[import-untyped]

from transplant_ray.evaluate.loss_tests import LossTest, loss_interval, losses_needed, no_worse_p
from transplant_ray.evaluate.significance import (
    ALPHA,
    POWER,
    Guard,
    check_guards,
    compare,
    difference_interval,
    examples_needed,
    mean_score,
    recovery_interval,
    score_interval,
)

LOSSES = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=3, max_size=60).filter(
    lambda pairs: np.std([a - b for a, b in pairs]) > 1e-6
)


def told(before: np.ndarray, after: np.ndarray) -> LossTest:
    test = compare(-before, -after)
    assert isinstance(test, LossTest)
    return test


@given(LOSSES)
def test_the_paired_t_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    before, after = np.array(pairs).T
    test = told(before, after)
    for alternative, p in (("two-sided", test.p), ("greater", test.p_better), ("less", test.p_worse)):
        assert p == pytest.approx(ttest_rel(before, after, alternative=alternative).pvalue, rel=1e-9, abs=1e-12)
    assert (test.before, test.after) == pytest.approx((before.mean(), after.mean()))
    interval = ttest_1samp(before - after, 0).confidence_interval(0.9)
    assert loss_interval(test, 0.1) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (score_interval(test, 0.1).low, score_interval(test, 0.1).high) == loss_interval(test, 0.1)
    for margin in (0.05, 2.0):
        expected = ttest_1samp(before - after, -margin, alternative="greater").pvalue
        assert no_worse_p(test, margin) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_where_nothing_differs_nothing_is_found() -> None:
    same = np.linspace(1, 2, 50)
    test = told(same, same)
    assert (test.p, test.p_better, test.p_worse, test.difference) == (1, 1, 1, 0)
    assert no_worse_p(test, 0.01) == 0.5**50  # it lost nothing at all, on 50 examples
    assert no_worse_p(told(same[:3], same[:3]), 0.01) == 0.125  # on three that is no evidence
    assert told(same, same + 0.25).p == pytest.approx(0)
    assert told(same, same + 0.25).p_worse == pytest.approx(0)


def test_of_one_example_nothing_is_known() -> None:
    test = told(np.array([3.0]), np.array([1.0]))
    assert (test.p, test.p_better, no_worse_p(test, 0.1)) == (1, 1, 1)
    assert score_interval(test).low is None
    assert examples_needed(test) is None
    alone = np.array([-3.0])
    assert difference_interval(alone, target=alone).low is None
    assert recovery_interval(alone, target=alone - 1, source=alone + 1).low is None


@pytest.mark.parametrize("bad", [(np.zeros(3), np.zeros(4)), (np.zeros(0), np.zeros(0)), (np.zeros(2), np.zeros(2, bool))])
def test_what_cannot_be_compared_is_refused(bad: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected"):
        compare(*bad)


def test_the_test_keeps_its_level_on_skewed_losses() -> None:
    """Losses are log-normal here, and a variant only shuffles them: 5 % of 2,000 comparisons, within Monte-Carlo error."""
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(2000):
        shared = rng.lognormal(0, 1, 300)
        found += told(shared * rng.lognormal(0, 0.3, 300), shared * rng.lognormal(0, 0.3, 300)).p <= ALPHA
    assert binom.ppf(0.0005, 2000, 0.05) <= found <= binom.ppf(0.9995, 2000, 0.05)


@pytest.mark.parametrize("effect", [0.1, 0.3, 0.7])
def test_the_number_of_examples_is_statsmodels_own(effect: float) -> None:
    differences = np.random.default_rng(0).normal(0, 1, 400)
    differences = effect + (differences - differences.mean()) / differences.std(ddof=1)
    test = told(differences + 5, np.full(400, 5.0))
    exact = TTestPower().solve_power(effect, alpha=ALPHA / 2, power=POWER, alternative="larger")
    assert losses_needed(test, margin=0, level=ALPHA / 2, power=POWER) == pytest.approx(exact, abs=4)  # z in place of t
    assert examples_needed(test) == losses_needed(test, margin=0, level=ALPHA / 2, power=POWER)
    assert examples_needed(told(np.full(400, 5.0), differences + 5)) is None


def test_bootstraps_take_losses() -> None:
    rng = np.random.default_rng(1)
    target = rng.lognormal(0, 1, 400)
    source, after = 0.2 * target, 0.6 * target  # half of the gap
    interval = difference_interval(-after, target=-target)
    t = ttest_1samp(target - after, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((t.low, t.high), rel=0.1)
    recovery = recovery_interval(-after, target=-target, source=-source)
    assert (recovery.low, recovery.high) == pytest.approx((0.5, 0.5))
    assert "nat" in str(recovery_interval(-after, target=-target, source=-target[::-1]).reason)


def test_guards_by_loss_stand_beside_guards_by_accuracy() -> None:
    rng = np.random.default_rng(2)
    losses = rng.lognormal(0, 1, 200)
    noise = rng.normal(0, 0.05, 200)
    right = rng.random(200) < 0.7
    unharmed, harmed, reading = check_guards(
        [
            Guard("text", -losses, -(losses + noise), margin=0.05),
            Guard("code", -losses, -(losses + 0.2 + noise), margin=0.05),
            Guard("reading", right, right, margin=0.05),
        ]
    )
    assert (unharmed.holds, harmed.holds, reading.holds) == (True, False, True)
    assert harmed.pairs.difference == pytest.approx(-0.2, abs=0.02)
    assert unharmed.p_holm >= unharmed.p


def test_a_mean_score_is_what_a_tally_says() -> None:
    losses = np.random.default_rng(3).lognormal(0, 1, 101)
    assert mean_score(-losses) == pytest.approx(-losses.mean())
    assert mean_score(np.arange(7) < 3) == 3 / 7
