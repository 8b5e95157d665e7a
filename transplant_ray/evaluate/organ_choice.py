"""Which place of which organ wins, and whether that is more than luck.

The rule: of the trials, the smallest mean loss on the select half of the domain's text; of two that are equal, the earlier in the
grid. A trial that loses more on general text than `most_lost` cannot win. The test half is then read for three models alone: the
recipient, the winner, and the winner's layers untrained at the same place. Blocks are the pairs of the tests. A winner that reads
general text worse is confirmed *with loss*, however small the loss: whether it is worth the gain is for the reader to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transplant_ray.evaluate.loss_tests import compare_losses, loss_interval
from transplant_ray.evaluate.metrics import perplexity

Losses = npt.NDArray[np.float64]
"""(n,), nats a token of each block."""


@dataclass(frozen=True)
class Choice:
    winner: str | None
    """Label of a trial."""
    vetoed: tuple[str, ...]
    """Trials that lose more than is put up with."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same blocks; losses in nats a token."""

    n: int
    before: float
    after: float
    low: float | None
    """Of `before` − `after`, which is positive where the second is better; None for a single block."""
    high: float | None
    p: float
    """Two-sided."""

    @property
    def lowers(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def raises(self) -> bool:
        return self.high is not None and self.high < 0

    def to_json(self) -> dict[str, Any]:
        told = {"difference": self.before - self.after, "before_perplexity": perplexity(self.before)}
        return {**asdict(self), **told, "after_perplexity": perplexity(self.after)}


@dataclass(frozen=True)
class OrganVerdict:
    conclusion: str
    sentence: str


def choose_trial(domain: Mapping[str, float], general: Mapping[str, float], recipient: float, most_lost: float | None) -> Choice:
    """By trial, in the order of the grid: its mean loss on select. `recipient` is that of the recipient on general text."""
    vetoed = () if most_lost is None else tuple(label for label in domain if general[label] - recipient > most_lost)
    allowed = {label: loss for label, loss in domain.items() if label not in vetoed}
    return Choice(min(allowed, key=allowed.__getitem__, default=None), vetoed)


def compare_blocks(before: Losses, after: Losses, level: float) -> Comparison:
    test = compare_losses(-before, -after)
    low, high = loss_interval(test, level) if test.n > 1 else (None, None)
    return Comparison(test.n, test.before, test.after, low, high, test.p)


def judge(place: str, domain: Comparison, general: Comparison, untrained: Comparison | None, why_not: str | None) -> OrganVerdict:
    """`untrained` compares the untrained control with the winner on the domain; `why_not` says why there is none."""
    if domain.raises:
        conclusion = "worse than the recipient"
    elif not domain.lowers:
        conclusion = "not distinguishable from the recipient"
    elif untrained is None:
        conclusion = "gain, untrained layers not tested"
    elif not untrained.lowers:
        conclusion = "gain, not better than untrained layers"
    elif general.raises:
        conclusion = "confirmed, with loss"
    else:
        conclusion = "confirmed"
    verb = "lowers" if domain.lowers else "raises" if domain.raises else "leaves"
    sentences = [
        f"{place} {verb} perplexity on domain text {_from_to(domain)}",
        f"on general text it goes {_from_to(general)}",
        f"the same layers untrained come to {_shown(untrained.before)} on domain text, a difference of {_difference(untrained)}"
        if untrained is not None
        else f"the same layers untrained were not measured: {why_not}",
    ]
    return OrganVerdict(conclusion, "; ".join(sentences) + ".")


def _from_to(found: Comparison) -> str:
    return f"from {_shown(found.before)} to {_shown(found.after)} (n = {found.n} blocks of test, {_difference(found)})"


def _difference(found: Comparison) -> str:
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.before - found.after:+.4f}{interval} nats a token, p = {found.p:.2g}"


def _shown(loss: float) -> str:
    value = perplexity(loss)
    return "more than can be written" if value is None else f"{value:.4g}"


def mean_losses(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in losses.items()}
