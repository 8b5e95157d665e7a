"""Arms: what chance finds where it may choose as the sweep did (method.md, "Transplant and sweep" and "Verdict")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transplant_ray.evaluate.metrics import standard_error


@dataclass(frozen=True)
class Arms:
    """What the chosen set of each arm did on the test examples of the winner."""

    correct: tuple[int, ...]
    sets_each: int
    """Random sets that each was chosen from, of the sizes and kinds of the trials; 1 where they are plain random sets."""


def choose(accuracies: Sequence[float], ks: Sequence[int], parameters: Sequence[int], n: int) -> int:
    """Index of the smallest K within one standard error of the best, on n select examples; then of the fewest changed parameters.

    Then of the better one, then of the first. One rule for trials and for the sets of an arm. ValueError where there are none.
    """
    best = max(accuracies)
    floor = best - standard_error(best, n)
    close = [i for i, accuracy in enumerate(accuracies) if accuracy >= floor]
    return min(close, key=lambda i: (ks[i], parameters[i], -accuracies[i], i))
