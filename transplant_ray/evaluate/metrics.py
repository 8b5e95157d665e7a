"""The formulas: accuracy and its interval, TIR, Recovery, reachable recovery. All of them live here (method.md, "Metrics")."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt
from statistics import fmean, stdev

from scipy.stats import binomtest
from scipy.stats import t as student

LARGEST_LOSS = 700.0
"""Nats; the exponential of 710 is no number any more."""


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of an accuracy; ValueError where n is 0."""
    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    half = float(student.isf((1 - confidence) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


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
