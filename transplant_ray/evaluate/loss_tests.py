"""More than luck? The questions of `significance`, where every example has a loss instead of a right or wrong answer.

Student's t on the paired differences. Scores are minus the losses, so that more is better here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt

import numpy as np
import numpy.typing as npt
from scipy.stats import norm
from scipy.stats import t as student


@dataclass(frozen=True)
class LossPairs:
    """Two variants on the same examples; losses in nats a token."""

    n: int
    before: float
    """Mean loss."""
    after: float
    deviation: float
    """Standard deviation of the differences; 0 for a single example, of which nothing is known."""

    @property
    def difference(self) -> float:
        """Loss before − after: a gain is positive."""
        return self.before - self.after

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return self.deviation / sqrt(self.n)


@dataclass(frozen=True)
class LossTest(LossPairs):
    p: float
    """Two-sided."""
    p_better: float
    """One-sided: small where after is better than before."""
    p_worse: float


def pair_losses(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> LossPairs:
    """`before` and `after` are scores, (n,) each. ValueError where there are none, or not the same number on both sides."""
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"Found losses of shapes {before.shape} and {after.shape}, expected two vectors on the same examples.")
    deviation = float((after - before).std(ddof=1)) if before.size > 1 else 0.0
    return LossPairs(before.size, -float(before.mean()), -float(after.mean()), deviation)


def compare_losses(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> LossTest:
    """The paired t-test of scores."""
    pairs = pair_losses(before, after)
    better, worse = _tail(pairs, 0.0), _tail(pair_losses(after, before), 0.0)
    return LossTest(pairs.n, pairs.before, pairs.after, pairs.deviation, min(1.0, 2 * min(better, worse)), better, worse)


def no_worse_p(pairs: LossPairs, margin: float) -> float:
    """One-sided p of the hypothesis that after is worse than before by `margin` nats or more."""
    return _tail(pairs, -margin)


def loss_interval(pairs: LossPairs, alpha: float) -> tuple[float, float]:
    """Of the difference, at 1 − `alpha`."""
    half = float(student.isf(alpha / 2, pairs.n - 1)) * pairs.error if pairs.n > 1 else inf
    return pairs.difference - half, pairs.difference + half


def losses_needed(pairs: LossPairs, *, margin: float, level: float, power: float) -> int | None:
    """Examples at which such a difference would show, one-sided at `level`; None where it points the other way."""
    effect = pairs.difference + margin
    if effect <= 0 or pairs.n < 2:
        return None
    return max(2, ceil(((float(norm.isf(level)) + float(norm.isf(1 - power))) * pairs.deviation / effect) ** 2))


def _tail(pairs: LossPairs, difference: float) -> float:
    """How likely a difference as large as this one is, where the true one is `difference`. 1 for a single example."""
    if pairs.n < 2:
        return 1.0
    above = pairs.difference - difference
    if pairs.deviation == 0:  # of a spread of 0 Student knows nothing: each example is a coin that fell on the same side
        return 0.5**pairs.n if above > 0 else 1.0
    return float(student.sf(above / pairs.error, pairs.n - 1))
