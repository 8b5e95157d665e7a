"""What a ranker finds: scores, what they cost, and, where it looks at examples one by one, what each of them says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """Of a ranking. A pass is one over the whole probe set."""

    forwards: float = 0
    backwards: float = 0
    decodings: float = 0
    """Greedy decodings of the probe set, `rank.max_new_tokens` long."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What each example says of each module; the score is the mean, by weight."""

    modules: tuple[str, ...]
    values_EM: NDArray[np.float64]
    weight_E: NDArray[np.float64]

    @property
    def scores(self) -> dict[str, float]:
        return self.scores_of(np.arange(len(self.weight_E)))

    def scores_of(self, examples: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
        """As if only these examples had been measured; one may be there twice."""
        mean_M = np.average(self.values_EM[examples], axis=0, weights=self.weight_E[examples])
        return dict(zip(self.modules, mean_M.tolist(), strict=True))


@dataclass(frozen=True)
class Measured:
    scores: Scores
    cost: Cost = Cost()
    sample: Sample | None = None
    """None where the ranker looks at no examples, or at all of them at once."""
    channels: Mapping[str, tuple[float, ...]] | None = None
    """Module → score of each output channel, where the ranker tells."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sample: Sample,
        cost: Cost = Cost(),
        channels: Mapping[str, tuple[float, ...]] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Measured:
        return cls(sample.scores, cost, sample, channels, notes)
