"""Tests and intervals over paired answers, against statsmodels, scipy, slow loops, and by counting every possible outcome."""

from __future__ import annotations

from fractions import Fraction
from math import comb, nan
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, bootstrap, multinomial, norm
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests

from transplant_ray.evaluate.metrics import recovery
from transplant_ray.evaluate.significance import (
    ALPHA,
    POWER,
    RESAMPLES,
    Guard,
    Interval,
    Pairs,
    Right,
    arms_needed,
    chance_p,
    check_guards,
    difference_interval,
    examples_needed,
    mcnemar,
    non_inferiority_p,
    pair,
    recovery_interval,
    resample,
    score_interval,
    tir_interval,
)

CELLS = st.tuples(*[st.integers(0, 40)] * 4).filter(any)
"""Examples right in both, gained, lost, wrong in both."""
MARGINS = st.sampled_from([0.01, 0.02, 0.05, 0.2])


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[Right, Right]:
    """Before and after."""
    cells = (both, gained, lost, neither)
    return np.repeat([True, False, True, False], cells), np.repeat([True, True, False, False], cells)


def first(correct: int, n: int = 100) -> Right:
    """The first examples right: two such vectors differ as little as they can."""
    return np.arange(n) < correct


# Pairs and McNemar.


@settings(max_examples=60, deadline=None)
@given(CELLS)
def test_mcnemar_is_the_exact_test_of_statsmodels(cells: tuple[int, int, int, int]) -> None:
    both, gained, lost, neither = cells
    test = mcnemar(*answers(*cells))
    assert (test.n, test.both, test.gained, test.lost) == (sum(cells), both, gained, lost)
    assert test.p == pytest.approx(float(reference_mcnemar([[both, lost], [gained, neither]], exact=True).pvalue), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(CELLS)
def test_each_direction_is_a_tail_of_the_coin(cells: tuple[int, int, int, int]) -> None:
    _, gained, lost, _ = cells
    test, d = mcnemar(*answers(*cells)), gained + lost
    assert test.p_better == pytest.approx(float(Fraction(sum(comb(d, i) for i in range(gained, d + 1)), 2**d)), abs=1e-9)
    assert test.p_worse == pytest.approx(float(Fraction(sum(comb(d, i) for i in range(gained + 1)), 2**d)), abs=1e-9)
    back = mcnemar(*answers(*cells)[::-1])
    assert (back.p, back.p_better, back.p_worse) == pytest.approx((test.p, test.p_worse, test.p_better), abs=1e-12)


def test_a_vector_is_not_better_than_itself() -> None:
    test = mcnemar(first(30), first(30))
    assert (test.p, test.p_better, test.p_worse, test.gained, test.lost) == (1, 1, 1, 0, 0)


@settings(max_examples=30, deadline=None)
@given(CELLS)
def test_accuracies_come_back_from_the_pairs(cells: tuple[int, int, int, int]) -> None:
    before, after = answers(*cells)
    pairs = pair(before, after)
    assert (pairs.before, pairs.after) == (before.mean(), after.mean())
    assert pairs.difference == pytest.approx(after.mean() - before.mean(), abs=1e-12)


@pytest.mark.parametrize(("before", "after"), [(3, 4), (0, 0)])
def test_answers_that_are_not_paired_are_refused(before: int, after: int) -> None:
    with pytest.raises(ValueError, match=r"shapes \(\d,\) and \(\d,\)"):
        pair(np.zeros(before, dtype=bool), np.zeros(after, dtype=bool))


# Intervals.


def three(seed: int = 5, n: int = 200) -> tuple[Right, Right, Right]:
    """After, target and source, correlated by example."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(n)
    after, target, source = (hardness + 0.3 * rng.random(n) < bar for bar in (0.7, 0.45, 0.85))
    return after, target, source


def test_resamples_keep_the_pairs_together_and_repeat_with_the_seed() -> None:
    after, target, _ = three()
    drawn = resample((after, target, after), 3)
    assert drawn.shape == (RESAMPLES, 3)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn == resample((after, target, after), 3)).all()
    assert not (drawn == resample((after, target, after), 4)).all()


def test_resamples_have_the_mean_and_covariance_of_drawing_examples() -> None:
    vectors = three()
    drawn = resample(vectors, 0)
    spread = np.cov(np.stack(vectors).astype(float), bias=True) / len(vectors[0])
    assert drawn.mean(axis=0) == pytest.approx(np.mean(vectors, axis=1), abs=4 * np.sqrt(spread.max() / RESAMPLES))
    assert np.cov(drawn.T) == pytest.approx(spread, abs=0.06 * spread.max())


def scipys(statistic: object, *vectors: Right) -> tuple[float, float]:
    data = tuple(v.astype(float) for v in vectors)
    found = bootstrap(data, statistic, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES, rng=1, batch=1000)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    after, target, source = three()

    def difference(a: np.ndarray, t: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - t.mean(axis)

    def ratio(a: np.ndarray, t: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) / t.mean(axis)

    def closed(a: np.ndarray, t: np.ndarray, s: np.ndarray, axis: int) -> np.ndarray:
        return (a.mean(axis) - t.mean(axis)) / (s.mean(axis) - t.mean(axis))

    for found, expected in (
        (difference_interval(after, target=target), scipys(difference, after, target)),
        (tir_interval(after, target=target), scipys(ratio, after, target)),
        (recovery_interval(after, target=target, source=source), scipys(closed, after, target, source)),
    ):
        width = expected[1] - expected[0]
        assert (found.low, found.high) == pytest.approx(expected, abs=0.06 * width)  # two draws of 10,000 differ by so much
        assert (found.undefined_share, found.reason) == (0, None)


def test_of_the_same_resamples_the_intervals_are_scipys() -> None:
    after, target, source = three()
    after_R, target_R, source_R = resample((after, target, source), 7).T
    for found, value_R in (
        (difference_interval(after, target=target, seed=7), resample((after, target), 7) @ [1, -1]),
        (recovery_interval(after, target=target, source=source, seed=7), (after_R - target_R) / (source_R - target_R)),
    ):
        drawn = SimpleNamespace(bootstrap_distribution=value_R)
        same = bootstrap((after.astype(float),), np.mean, n_resamples=0, bootstrap_result=drawn, method="percentile")
        assert (found.low, found.high) == pytest.approx(tuple(same.confidence_interval), abs=1e-9)


def test_a_difference_from_a_target_that_knows_nothing_has_the_quantiles_of_a_binomial() -> None:
    found = difference_interval(first(30), target=first(0))
    assert found.low == pytest.approx(binom.ppf(ALPHA / 2, 100, 0.3) / 100, abs=0.0101)  # one example
    assert found.high == pytest.approx(binom.ppf(1 - ALPHA / 2, 100, 0.3) / 100, abs=0.0101)


def test_undefined_resamples_are_counted_and_over_one_percent_there_is_no_interval() -> None:
    none = (1 - 2 / 100) ** 100  # share of resamples in which a target with 2 of 100 has 0
    few = tir_interval(first(30), target=first(2))
    assert few.low is None
    assert few.high is None
    assert few.undefined_share == pytest.approx(none, abs=4 * np.sqrt(none / RESAMPLES))
    assert few.reason == f"{100 * few.undefined_share:.1f} % of the resamples have no value"
    enough = tir_interval(first(30), target=first(6))
    assert enough.undefined_share < 0.01
    assert enough.reason is None
    assert enough.low is not None
    assert enough.high is not None
    assert enough.low < 5 < enough.high


def test_tir_of_a_target_at_zero_has_no_interval() -> None:
    assert tir_interval(first(30), target=first(0)) == Interval(None, None, 1.0, "100.0 % of the resamples have no value")


@pytest.mark.parametrize("source", [50, 51, 49, 53])
def test_recovery_has_no_interval_where_the_gap_may_be_zero(source: int) -> None:
    found = recovery_interval(first(60), target=first(50), source=first(source))
    assert (found.low, found.high) == (None, None)
    assert found.reason is not None
    assert found.reason.startswith("the gap between source and target may be 0 (95 % interval ")


def test_a_source_that_is_worse_leaves_a_gap_too() -> None:
    found = recovery_interval(first(40), target=first(60), source=first(20))
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high


def test_the_winner_that_is_the_source_has_closed_the_gap_in_every_resample() -> None:
    source = first(60)
    assert recovery_interval(source, target=first(30), source=source) == Interval(1.0, 1.0)
    assert recovery(0.6, target=0.3, source=0.6) == 1


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    runs, covered = 200, {"difference": 0, "recovery": 0}
    for run in range(runs):
        hardness = rng.random(200)
        after, target, source = hardness < 0.6, hardness < 0.4, hardness + 0.2 * rng.random(200) < 0.9
        difference = difference_interval(after, target=target, seed=run)
        closed = recovery_interval(after, target=target, source=source, seed=run)
        assert difference.low is not None
        assert difference.high is not None
        assert closed.low is not None
        assert closed.high is not None
        covered["difference"] += difference.low <= 0.2 <= difference.high
        covered["recovery"] += closed.low <= 0.5 <= closed.high
    assert min(covered.values()) >= binom.ppf(0.005, runs, 0.94), covered  # percentiles are known to cover a little less than 95 %


# Chance.


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_chance_is_the_rank_among_arms_and_a_tie_is_as_good(value: int, arms: list[int]) -> None:
    everyone = sorted([value, *arms], reverse=True)
    place = len(everyone) - everyone[::-1].index(value)  # the worst of those that tie
    assert chance_p(value, arms) == pytest.approx(place / len(everyone), abs=1e-12)


@pytest.mark.parametrize(("num_arms", "p"), [(3, 0.25), (18, 1 / 19), (19, 0.05)])
def test_nineteen_arms_are_the_fewest_that_can_tell(num_arms: int, p: float) -> None:
    assert chance_p(0.5, [0.4] * num_arms) == p
    assert (p <= ALPHA) == (num_arms >= 19)


@pytest.mark.parametrize(("as_good", "num_arms"), [(0, 19), (1, 30), (1, 38), (2, 50)])
def test_so_many_arms_tell_at_80_percent_and_fewer_do_not(as_good: int, num_arms: int) -> None:
    share, needed = as_good / num_arms, arms_needed(as_good, num_arms)

    def power(m: int) -> float:
        return sum(float(binom.pmf(x, m, share)) for x in range(m + 1) if Fraction(1 + x, m + 1) <= Fraction(1, 20))

    assert needed is not None
    assert needed == next(m for m in range(1, needed + 1) if power(m) >= POWER)


@pytest.mark.parametrize(("as_good", "num_arms"), [(1, 19), (19, 19), (2, 40), (3, 62)])
def test_a_share_of_a_twentieth_or_nearly_is_beyond_any_number_of_arms(as_good: int, num_arms: int) -> None:
    assert arms_needed(as_good, num_arms) is None


# Guards.


def likeliest_variance(pairs: Pairs, difference: float) -> float:
    """Of gained − lost on one example, by searching the likeliest table with this difference."""
    same = pairs.n - pairs.gained - pairs.lost

    def slope(lost: float) -> float:
        """Of the log-likelihood, which is concave."""
        cells = ((pairs.gained, lost + difference, 1), (pairs.lost, lost, 1), (same, 1 - 2 * lost - difference, -2))
        return sum(count * sign / share for count, share, sign in cells if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    inner = low + 1e-14, high - 1e-14
    lost = low if slope(inner[0]) <= 0 else high if slope(inner[1]) >= 0 else brentq(slope, *inner, xtol=1e-16)
    return 2 * lost + difference - difference**2


@settings(max_examples=100, deadline=None)
@given(CELLS, MARGINS)
def test_the_score_test_takes_the_likeliest_table_at_the_margin(cells: tuple[int, int, int, int], margin: float) -> None:
    pairs = pair(*answers(*cells))
    z = (pairs.difference + margin) / np.sqrt(likeliest_variance(pairs, -margin) / pairs.n)
    assert non_inferiority_p(pairs, margin) == pytest.approx(norm.sf(z), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(CELLS, MARGINS)
def test_the_interval_is_what_the_score_test_does_not_refuse(cells: tuple[int, int, int, int], margin: float) -> None:
    pairs = pair(*answers(*cells))
    interval = score_interval(pairs, 2 * ALPHA)
    assert interval.low is not None
    assert interval.high is not None
    assert -1 <= interval.low <= pairs.difference <= interval.high <= 1
    if -1 < interval.low < 0:
        assert non_inferiority_p(pairs, -interval.low) == pytest.approx(ALPHA, abs=1e-9)
    assume(abs(interval.low + margin) > 1e-9)
    assert (non_inferiority_p(pairs, margin) < ALPHA) == (interval.low > -margin)


def test_no_difference_on_few_examples_proves_nothing() -> None:
    """A bootstrap would give an interval of width 0."""
    few, many = pair(first(5, 10), first(5, 10)), pair(first(100, 200), first(100, 200))
    assert non_inferiority_p(few, 0.02) > 0.3
    assert non_inferiority_p(many, 0.02) < 0.05


@pytest.mark.parametrize("gained", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize(("n", "margin"), [(50, 0.05), (100, 0.1), (200, 0.02)])
def test_a_guard_that_lost_the_margin_is_let_through_in_some_5_percent(n: int, margin: float, gained: float) -> None:
    """The share of tables, counted over all of them: the score test may be a little over its level, as its paper says."""
    table = multinomial(n, [gained, gained + margin, 1 - 2 * gained - margin])
    won, lost = np.divmod(np.arange((n + 1) ** 2), n + 1)
    possible = won + lost <= n
    mass = table.pmf(np.stack([won, lost, n - won - lost], axis=1)[possible])
    likely = mass > 1e-7
    pairs = [Pairs(n, 0, int(up), int(down)) for up, down in zip(won[possible][likely], lost[possible][likely], strict=True)]
    let_through = sum(m for m, p in zip(mass[likely], pairs, strict=True) if non_inferiority_p(p, margin) <= ALPHA)
    assert let_through < 0.06


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0, nan])
def test_a_margin_is_a_share(margin: float) -> None:
    with pytest.raises(ValueError, match=f"margin of {margin}, expected a share"):
        non_inferiority_p(Pairs(10, 5, 1, 1), margin)


def test_guards_are_adjusted_by_holm_over_all_of_them() -> None:
    guards = [Guard(str(lost), first(150, 200), first(150 - lost, 200), 0.04) for lost in (0, 3, 12, 1)]
    tests = check_guards(guards)
    adjusted = multipletests([test.p for test in tests], method="holm")[1]
    assert [test.p_holm for test in tests] == pytest.approx(adjusted.tolist(), abs=1e-12)
    assert [test.name for test in tests] == ["0", "3", "12", "1"]
    assert [test.holds for test in tests] == [True, False, False, True]
    assert tests[1].p < ALPHA < tests[1].p_holm
    alone = check_guards(guards[:1])[0]
    assert alone.p_holm == alone.p == tests[0].p
    assert alone.interval == score_interval(pair(first(150, 200), first(150, 200)), 0.1)
    assert check_guards(()) == ()


# Sample sizes.


def exact_power(n: int, gained: float, lost: float) -> float:
    """Of the exact two-sided McNemar test to find a gain, over all numbers of differing examples."""
    differ = np.arange(n + 1)
    most_lost = binom.ppf(ALPHA / 2, differ, 0.5)
    most_lost -= binom.cdf(most_lost, differ, 0.5) > ALPHA / 2
    return float(np.sum(binom.pmf(differ, n, gained + lost) * binom.cdf(most_lost, differ, lost / (gained + lost))))


@pytest.mark.parametrize("pairs", [Pairs(50, 8, 5, 0), Pairs(50, 8, 6, 2), Pairs(300, 100, 40, 30), Pairs(300, 0, 70, 55)])
def test_with_so_many_examples_the_exact_test_finds_the_gain_in_80_percent(pairs: Pairs) -> None:
    needed = examples_needed(pairs)
    assert needed is not None
    assert needed > pairs.n
    assert exact_power(needed, pairs.gained / pairs.n, pairs.lost / pairs.n) == pytest.approx(POWER, abs=0.06)


@settings(max_examples=60, deadline=None)
@given(CELLS)
def test_connors_sample_size_by_hand(cells: tuple[int, int, int, int]) -> None:
    _, gained, lost, _ = cells
    pairs, n = pair(*answers(*cells)), sum(cells)
    if gained <= lost:
        assert examples_needed(pairs) is None
        return
    differ, effect = (gained + lost) / n, (gained - lost) / n
    size = (1.959963984540054 * differ**0.5 + 0.8416212335729143 * (differ - effect**2) ** 0.5) ** 2 / effect**2
    found = examples_needed(pairs)
    assert found is not None
    assert size - 1e-6 <= found < size + 1 + 1e-6


def test_a_guard_needs_enough_examples_to_show_that_it_holds() -> None:
    unchanged, harmed = Pairs(20, 10, 0, 0), Pairs(20, 10, 0, 2)
    needed = examples_needed(unchanged, margin=0.05, level=ALPHA)
    assert needed is not None
    assert non_inferiority_p(Pairs(needed, 0, 0, 0), 0.05) <= ALPHA < non_inferiority_p(Pairs(needed - 1, 0, 0, 0), 0.05)
    assert examples_needed(harmed, margin=0.05) is None
