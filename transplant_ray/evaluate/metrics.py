"""The formulas: accuracy and its interval, TIR, Recovery, reachable recovery. All of them live here (method.md, "Metrics").

`scipy.stats` takes two seconds to import, and evaluators, who import this, draw no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt
from statistics import fmean, stdev, variance

LARGEST_LOSS = 700.0
"""Nats; the exponential of 710 is no number any more."""


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of an accuracy; ValueError where n is 0."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    half = _quantile(confidence, len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def crossed_interval(values_SB: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval of the mean of what S seeds gave on the same B blocks of text: of what other seeds would give on other such text.

    The mean varies by the seeds that were drawn and by the blocks: both variances are added, with Satterthwaite's degrees of
    freedom (Biometrics Bulletin 2, 1946). Where seeds are few and decide nearly alone that is too narrow, so it is never narrower
    than Student's interval over the seeds. None for a single seed.
    """
    of_seeds, of_blocks = [fmean(row) for row in values_SB], [fmean(column) for column in zip(*values_SB, strict=True)]
    by_seed = mean_interval(of_seeds, confidence)
    if by_seed is None or len(of_blocks) < 2:
        return by_seed
    parts = [(variance(means) / len(means), len(means) - 1) for means in (of_seeds, of_blocks)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return by_seed
    freedom = total**2 / sum(part**2 / each for part, each in parts)
    half = max(_quantile(confidence, freedom) * sqrt(total), (by_seed[1] - by_seed[0]) / 2)
    return fmean(of_seeds) - half, fmean(of_seeds) + half


def _quantile(confidence: float, freedom: float) -> float:
    """Of Student's distribution: how many standard errors an interval reaches to each side."""
    from scipy.stats import t as student

    return float(student.isf((1 - confidence) / 2, freedom))


def standard_error(accuracy: float, n: int) -> float:
    """Of a proportion, by its normal approximation."""
    return sqrt(accuracy * (1 - accuracy) / n)


def tir(accuracy: float, *, target: float) -> float | None:
    """Target improvement ratio: accuracy after ÷ the target's. None where the target is at 0. Kim et al. 2026, section 4."""
    return None if target == 0 else accuracy / target


def perplexity(loss: float) -> float | None:
    """Of a mean loss in nats; None where no number is as large."""
    return exp(loss) if loss < LARGEST_LOSS else None


def perplexity_kept(loss: float, *, target: float) -> float | None:
    """The target's perplexity ÷ that after: 1 where nothing is lost, as TIR is of an accuracy."""
    return perplexity(target - loss)


def recovery(score: float, *, target: float, source: float) -> float | None:
    """Share of the source-target gap that is closed, of accuracies or of losses: 0 at the target, 1 at the source.

    None where source and target tie, for then there is no gap. Kim et al. 2026, section 4.
    """
    return None if source == target else (score - target) / (source - target)


def reachable_recovery(score: float, *, target: float, all_swapped: float) -> float | None:
    """Recovery against what swapping every compatible module reaches; None where that reaches nothing."""
    return recovery(score, target=target, source=all_swapped)
