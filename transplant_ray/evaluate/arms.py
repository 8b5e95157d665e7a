"""Arms: what chance finds where it may choose as the sweep did (method.md, "Transplant and sweep" and "Verdict")."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arms:
    """What the chosen set of each arm did on the test examples of the winner."""

    scores: tuple[float, ...]
    """Accuracies, or minus losses."""
    sets_each: int
    """Random sets that each was chosen from, of the sizes and kinds of the trials; 1 where they are plain random sets."""
