"""The formulas: accuracy and its interval, TIR, Recovery, reachable recovery. All of them live here (method.md, "Metrics")."""

from __future__ import annotations

from math import sqrt

from scipy.stats import binomtest


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of an accuracy; ValueError where n is 0."""
    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def standard_error(accuracy: float, n: int) -> float:
    """Of a proportion, by its normal approximation."""
    return sqrt(accuracy * (1 - accuracy) / n)


def tir(accuracy: float, *, target: float) -> float | None:
    """Target improvement ratio: accuracy after ÷ the target's. None where the target is at 0. Kim et al. 2026, section 4."""
    return None if target == 0 else accuracy / target


def recovery(accuracy: float, *, target: float, source: float) -> float | None:
    """Share of the source-target gap that is closed: 0 at the target, 1 at the source.

    None where source and target tie, for then there is no gap. Kim et al. 2026, section 4.
    """
    return None if source == target else (accuracy - target) / (source - target)


def reachable_recovery(accuracy: float, *, target: float, all_swapped: float) -> float | None:
    """Recovery against what swapping every compatible module reaches; None where that reaches nothing."""
    return recovery(accuracy, target=target, source=all_swapped)
