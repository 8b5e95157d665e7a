"""Who goes on: the screen by loss and the race by rungs. Pure functions, so that two runs of a recipe stop the same variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil

from transplant_ray.recipe import RaceSpec, ScreenSpec


def legs(num_examples: int, race: RaceSpec | None) -> list[slice]:
    """The examples between one rung and the next; without a race there is one leg."""
    return [slice(start, stop) for start, stop in pairwise([0, *(race.rungs if race else ()), num_examples])]


def pass_rung(scores: Mapping[str, float], race: RaceSpec) -> set[str]:
    """The variants with the best score so far, ties by id. `scores` has every variant that is still in the race."""
    return _first(sorted(scores, key=lambda variant: (-scores[variant], variant)), race.keep)


def pass_screen(losses: Mapping[str, float | None], screen: ScreenSpec) -> set[str]:
    """The variants with the smallest loss, ties by id; one whose loss is not a number never passes before one that has one."""

    def place(variant: str) -> tuple[bool, float, str]:
        loss = losses[variant]
        return loss is None, loss or 0.0, variant

    return _first(sorted(losses, key=place), screen.keep)


def _first(ordered: Sequence[str], keep: float) -> set[str]:
    return set(ordered[: ceil(len(ordered) * keep)])


def num_answers(num_racers: int, num_others: int, num_examples: int, screen: ScreenSpec | None, race: RaceSpec | None) -> int:
    """How many answers a sweep generates on `num_examples`, when every variant that may be stopped is."""
    live = num_live(num_racers, screen, None)
    total = 0
    for leg in legs(num_examples, race):
        total += (live + num_others) * (leg.stop - leg.start)
        live = ceil(live * race.keep) if race else live
    return total


def num_live(num_racers: int, screen: ScreenSpec | None, race: RaceSpec | None) -> int:
    """How many are never stopped."""
    live = ceil(num_racers * screen.keep) if screen else num_racers
    for _ in race.rungs if race else ():
        live = ceil(live * race.keep) if race else live
    return live
