"""How a winner is chosen on select: one rule for the trials of a sweep and for the sets of an arm (method.md, "Winner")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from statistics import mean

from transplant_ray.evaluate.outcome import Tally
from transplant_ray.recipe import ObjectiveSpec

TINY = 1e-9
"""0.9 − 0.85 is more than 0.05 in floating point."""


@dataclass(frozen=True)
class Candidate:
    worth: float
    """Accuracy, or minus the loss, less what the guards lost at the recipe's price."""
    error: float
    """Standard error of it."""
    size: float
    """Modules that are changed, those of which some channels are by their share."""
    num_parameters: int
    vetoed_by: str | None = None
    """A guard that lost more than its margin."""


@dataclass(frozen=True)
class Guarded:
    """A guard on select, before and after."""

    name: str
    target: Tally
    variant: Tally
    margin: float

    @property
    def lost(self) -> float:
        """Of accuracy, or nats; a gain is no loss."""
        return max(0.0, self.target.score - self.variant.score)


def weigh(tally: Tally, guards: Sequence[Guarded], objective: ObjectiveSpec | None, size: float, num_parameters: int) -> Candidate:
    """A variant by its score and, where the recipe has an objective, by what it costs on the guards."""
    if objective is None:
        return Candidate(tally.score, tally.score_error, size, num_parameters)
    lost = [guard for guard in guards if guard.lost > 0]
    errors = [guard.variant.score_error for guard in lost]
    worth = tally.score - objective.price * mean(guard.lost for guard in guards)
    vetoed = next((guard.name for guard in lost if guard.lost > guard.margin + TINY), None) if objective.veto else None
    return Candidate(
        worth, hypot(tally.score_error, *(objective.price / len(guards) * e for e in errors)), size, num_parameters, vetoed
    )


def choose(candidates: Sequence[Candidate]) -> int | None:
    """Index of the smallest within one standard error of the best; then of the fewest changed parameters, the better, the first.

    None where there is none, or all are vetoed.
    """
    left = [index for index, candidate in enumerate(candidates) if candidate.vetoed_by is None]
    if not left:
        return None
    best = max((candidates[index] for index in left), key=lambda candidate: candidate.worth)
    close = [index for index in left if candidates[index].worth >= best.worth - best.error]
    return min(close, key=lambda i: (candidates[i].size, candidates[i].num_parameters, -candidates[i].worth, i))
