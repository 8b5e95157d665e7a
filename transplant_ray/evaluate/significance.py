"""More than luck? Tests and intervals over right and wrong answers to the same examples (method.md, "Metrics" and "Verdict").

Shapes: n examples, R resamples, V variants, P patterns of answers. Answers that are compared are to the same examples in the same
order. scipy and statsmodels wherever they have it; what they lack names its paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

from transplant_ray.evaluate.loss_tests import (
    LossPairs,
    LossTest,
    compare_losses,
    loss_interval,
    losses_needed,
    no_worse_p,
)

Right = npt.NDArray[np.bool_]
"""(n,) whether a variant is right on each example."""
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[Any]
"""(n,) Right or Floats: whether it is right on each example, or minus its loss: more is better."""

ALPHA = 0.05
POWER = 0.8
"""Of the sample sizes that are named where a test failed."""
RESAMPLES = 10_000
MOST_UNDEFINED = 0.01
"""Share of resamples without a value, over which what is left says little."""
MOST_ARMS = 10_000
CHUNK = 2**24
"""Counts that are drawn at a time."""


@dataclass(frozen=True)
class Pairs:
    """Two variants on the same examples, counted."""

    n: int
    both: int
    """Right before and after."""
    gained: int
    """Wrong before, right after."""
    lost: int

    @property
    def before(self) -> float:
        """Accuracy."""
        return (self.both + self.lost) / self.n

    @property
    def after(self) -> float:
        return (self.both + self.gained) / self.n

    @property
    def difference(self) -> float:
        """Accuracy after − before."""
        return (self.gained - self.lost) / self.n


def pair(before: Right, after: Right) -> Pairs:
    """ValueError where there are no examples, or not the same number on both sides."""
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"Found answers of shapes {before.shape} and {after.shape}, expected two vectors on the same examples.")
    return Pairs(before.size, int((before & after).sum()), int((~before & after).sum()), int((before & ~after).sum()))


# Differences.


@dataclass(frozen=True)
class McNemar(Pairs):
    p: float
    """Two-sided: twice the smaller of the others, for the coin is fair."""
    p_better: float
    """One-sided: small where after is better than before."""
    p_worse: float


def mcnemar(before: Right, after: Right) -> McNemar:
    """The exact test: of the examples on which two equal variants differ, each is gained or lost as a coin falls. McNemar 1947."""
    pairs = pair(before, after)
    better, worse = (_coin(pairs.gained, pairs.lost, side) for side in ("greater", "less"))
    return McNemar(pairs.n, pairs.both, pairs.gained, pairs.lost, min(1.0, 2 * min(better, worse)), better, worse)


def _coin(heads: int, tails: int, side: str) -> float:
    return float(binomtest(heads, heads + tails, alternative=side).pvalue) if heads + tails else 1.0


def compare(before: Scores, after: Scores) -> McNemar | LossTest:
    """McNemar's test of right and wrong answers, the paired t-test of losses."""
    if before.dtype != after.dtype:
        raise ValueError(f"Found scores of types {before.dtype} and {after.dtype}, expected the same measure on both sides.")
    return mcnemar(before, after) if before.dtype == np.bool_ else compare_losses(before, after)


# Intervals.


@dataclass(frozen=True)
class Interval:
    low: float | None
    high: float | None
    undefined_share: float = 0.0
    """Of the resamples."""
    reason: str | None = None
    """Why there is none; None where there is one."""


def resample(variants: Sequence[Scores], seed: int) -> Floats:
    """Mean scores (R, V) on resamples of the examples, drawn with replacement and the same for all variants.

    Examples with the same pattern of answers are alike, so the number of each pattern in a resample is multinomial: the paired
    bootstrap itself, without a table of R × n examples.
    """
    pattern_PV, count_P = np.unique(np.stack(variants, axis=1), axis=0, return_counts=True)
    n = int(count_P.sum())
    weight_PV: Scores = pattern_PV.astype(np.int64) if pattern_PV.dtype == np.bool_ else pattern_PV
    generator = np.random.default_rng(seed)
    sizes = [len(chunk) for chunk in np.array_split(range(RESAMPLES), 1 + RESAMPLES * len(count_P) // CHUNK)]
    drawn = (generator.multinomial(n, count_P / n, size=size) for size in sizes)
    mean_RV: Floats = np.concatenate([drawn_RP @ weight_PV / n for drawn_RP in drawn])
    return mean_RV


FEW = Interval(None, None, reason="a single example has no spread")


def difference_interval(after: Scores, *, target: Scores, seed: int = 0) -> Interval:
    """95 % paired percentile bootstrap of the score after − the target's. Efron and Tibshirani 1993, chapter 13."""
    if target.size < 2:
        return FEW
    after_R, target_R = resample((after, target), seed).T
    return _percentiles(after_R - target_R)


def tir_interval(after: Right, *, target: Right, seed: int = 0) -> Interval:
    """95 % paired percentile bootstrap of TIR; undefined where a resample has the target at 0."""
    after_R, target_R = resample((after, target), seed).T
    return _percentiles(_ratio(after_R, target_R))


def recovery_interval(after: Scores, *, target: Scores, source: Scores, seed: int = 0) -> Interval:
    """95 % paired percentile bootstrap of Recovery, or of reachable recovery with all swapped as `source`.

    None where the interval of the gap includes 0: there the denominator may change sign, and percentiles of the ratio mean nothing.
    """
    if target.size < 2:
        return FEW
    after_R, target_R, source_R = resample((after, target, source), seed).T
    gap = _percentiles(source_R - target_R)
    found = _percentiles(_ratio(after_R - target_R, source_R - target_R))
    if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
        unit = "points" if target.dtype == np.bool_ else "hundredths of a nat"
        reason = f"the gap between source and target may be 0 (95 % interval {_span(gap)} {unit})"
        return Interval(None, None, found.undefined_share, reason)
    return found


def _ratio(over_R: Floats, under_R: Floats) -> Floats:
    """NaN where undefined."""
    return np.divide(over_R, under_R, out=np.full_like(over_R, np.nan), where=under_R != 0)


def _percentiles(value_R: Floats) -> Interval:
    undefined = float(np.isnan(value_R).mean())
    if undefined > MOST_UNDEFINED:
        return Interval(None, None, undefined, f"{100 * undefined:.1f} % of the resamples have no value")
    low, high = np.nanquantile(value_R, (ALPHA / 2, 1 - ALPHA / 2)).tolist()
    return Interval(low, high, undefined)


def _span(interval: Interval) -> str:
    return " to ".join(f"{100 * end:+.1f}" for end in (interval.low, interval.high) if end is not None)


def mean_score(scores: Scores) -> float:
    """The accuracy, or minus the mean loss; to the last bit what a tally says."""
    return float(scores.sum()) / scores.size if scores.dtype == np.bool_ else fmean(scores.tolist())


# Chance.


def chance_p(value: float, arms: Sequence[float]) -> float:
    """Of a winner among m arms that were chosen as it was: (1 + number at least as good) ÷ (m + 1). Phipson and Smyth 2010."""
    return (1 + sum(arm >= value for arm in arms)) / (len(arms) + 1)


def arms_needed(num_as_good: int, num_arms: int) -> int | None:
    """Arms at which a winner that this share of arms equals is better than chance at 0.05 with power 0.8.

    None where the share is too large for any number, or the number over 10,000.
    """
    twentieths = np.arange(1, MOST_ARMS // 20)
    arms = 20 * twentieths - 1  # between these, one more arm allows no more of them to be as good
    reached = binom.cdf(twentieths - 1, arms, num_as_good / num_arms) >= POWER
    return int(arms[reached.argmax()]) if reached.any() else None


# Guards.


@dataclass(frozen=True, eq=False)
class Guard:
    """An ability that the transplant should not harm."""

    name: str
    target: Scores
    variant: Scores
    margin: float
    """Loss of accuracy that is put up with, a share in (0, 1); of losses, nats."""
    held_out: bool = False
    """Whether nothing was fitted on it or chosen by it."""


@dataclass(frozen=True)
class GuardTest:
    name: str
    pairs: Pairs | LossPairs
    margin: float
    interval: Interval
    """90 %, of variant − target: its low end is the one-sided 95 % bound of this guard by itself."""
    p: float
    """One-sided, of a loss of the margin or more."""
    p_holm: float
    """The same, adjusted for the number of guards."""
    held_out: bool = False

    @property
    def holds(self) -> bool:
        return self.p_holm <= ALPHA


def check_guards(guards: Sequence[Guard], num_missing: int = 0) -> tuple[GuardTest, ...]:
    """Non-inferiority of each guard, and Holm's adjustment over all of them and those that could not be measured."""
    if not guards:
        return ()
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]  # half a second that only guards need

    pairs = [compare(guard.target, guard.variant) for guard in guards]
    ps = [non_inferiority_p(each, guard.margin) for each, guard in zip(pairs, guards, strict=True)]
    adjusted = multipletests([*ps, *[1.0] * num_missing], alpha=ALPHA, method="holm")[1].tolist()
    rows = zip(guards, pairs, ps, adjusted, strict=False)  # what is missing stands last
    return tuple(
        GuardTest(g.name, each, g.margin, score_interval(each, 2 * ALPHA), p, holm, g.held_out) for g, each, p, holm in rows
    )


def non_inferiority_p(pairs: Pairs | LossPairs, margin: float) -> float:
    """One-sided p of the hypothesis that after is worse than before by `margin` or more. Tango 1998; Liu et al. 2002.

    The score test, not the bootstrap: ten examples without a single difference would give a bootstrap interval of width 0. Losses
    are held to Student's t. ValueError where the margin is not in (0, 1).
    """
    if isinstance(pairs, LossPairs):
        return no_worse_p(pairs, margin)
    if not 0 < margin < 1:
        raise ValueError(f"Found a margin of {margin}, expected a share of the examples, more than 0 and less than 1.")
    return float(norm.sf(_score(pairs, -margin)))


def score_interval(pairs: Pairs | LossPairs, alpha: float = ALPHA) -> Interval:
    """Of the difference: the values that the two-sided score test does not refuse at `alpha`. Tango 1998. Of losses: Student's."""
    if isinstance(pairs, LossPairs):
        return Interval(*loss_interval(pairs, alpha)) if pairs.n > 1 else Interval(None, None, reason="a single example")
    swapped = Pairs(pairs.n, pairs.both, gained=pairs.lost, lost=pairs.gained)
    return Interval(_score_low(pairs, alpha), -_score_low(swapped, alpha))


def _score_low(pairs: Pairs, alpha: float) -> float:
    bound, inside = norm.isf(alpha / 2), pairs.difference - 1e-9
    if inside <= -1:
        return -1.0
    return float(brentq(lambda difference: _score(pairs, difference) - bound, -1 + 1e-9, inside, xtol=1e-13))


def _score(pairs: Pairs, difference: float) -> float:
    """How many standard errors the observed difference is above this one, a number in (-1, 1)."""
    return (pairs.difference - difference) / sqrt(_null_variance(pairs, difference) / pairs.n)


def _null_variance(pairs: Pairs, difference: float) -> float:
    """Of gained − lost on one example, at the likeliest share of lost for which the difference is this one. Tango 1998."""
    n, gained, lost = pairs.n, pairs.gained, pairs.lost
    linear = (2 * n - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    share = (sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)
    return 2 * share + difference * (1 - difference)


# Sample sizes.


def examples_needed(pairs: Pairs | LossPairs, *, margin: float = 0.0, level: float = ALPHA / 2) -> int | None:
    """Examples at which the observed shares of gained and lost would show after > before − margin with power 0.8.

    `level` is one-sided. Connor 1987 for McNemar's test; with a margin, the null variance is Tango's. A normal approximation: the
    exact test takes a few more examples where few of them differ. None where the effect points the other way.
    """
    if isinstance(pairs, LossPairs):
        return losses_needed(pairs, margin=margin, level=level, power=POWER)
    effect = pairs.difference + margin
    if effect <= 0:
        return None
    null = sqrt(_null_variance(pairs, -margin))
    observed = sqrt((pairs.gained + pairs.lost) / pairs.n - pairs.difference**2)
    root = float(norm.isf(level) * null + norm.isf(1 - POWER) * observed) / effect
    return ceil(root**2)
