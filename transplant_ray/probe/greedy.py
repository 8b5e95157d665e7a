"""Greedy selection of whole modules: each time the one that lowers task loss + λ · guard loss most, while one does.

Plain greedy tries every module that is left at every step, N²/2 losses. Here the gain that a module had when it was last tried
stands for its gain now, the most promising are tried first, several in one packed pass, and a step ends when none that waits
promises more than the best that was just tried (Minoux 1978; "CELF" in Leskovec et al. 2007). Where gains only shrink as modules
are added this finds what plain greedy finds. Losses of models keep no such law: a module whose gain has grown since may come later
than it would. Nothing is lost at the end, for the search stops only after every module that is left was tried on what is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf

from transplant_ray.evaluate.engine import VARIANTS_PER_PACK
from transplant_ray.graft.variant import Variant
from transplant_ray.probe.measured import Cost
from transplant_ray.probe.search import Found, Losses, Search, check_search, losses
from transplant_ray.recipe import GreedySpec

LEAST_GAIN = 1e-6
"""Nats; below it the rounding of float32 decides."""

Objective = Callable[[Sequence[tuple[str, ...]]], Sequence[float]]
"""Sets of modules → what is to be lowered, of each."""


def greedy(search: Search, spec: GreedySpec) -> list[Found]:
    """One result for each λ, in the order of the grid: the set at which nothing lowers the objective any more.

    `Found.order` is the order in which modules came, so the K of a path are its first few, at no further cost. Results share what
    was measured. RecipeError where a λ or a kind has no effect, DataError for a guard without examples, NumericsError
    where a loss is not finite.
    """
    check_search(search, spec.penalty, "search.greedy")
    names = search.modules(spec.kind, "search.greedy.kind")
    known: dict[Variant, Losses] = {}
    return [_search_one(search, names, spec, penalty, known) for penalty in spec.penalty]


def _search_one(search: Search, names: tuple[str, ...], spec: GreedySpec, penalty: float, known: dict[Variant, Losses]) -> Found:
    start, num_known = time.perf_counter(), len(known)

    def objective(sets: Sequence[tuple[str, ...]]) -> list[float]:
        variants = [Variant.uniform(chosen) for chosen in sets]
        new = [variant for variant in variants if variant not in known]
        known.update(zip(new, losses(search, new) if new else (), strict=True))
        return [known[variant].objective(penalty) for variant in variants]

    order = lazy_order(names, objective, spec.k or len(names))
    variant = Variant.uniform(order)
    cost = Cost(forwards=len(known) - num_known, seconds=time.perf_counter() - start)
    return Found.of(variant, penalty, known[variant], known[variant], len(names), cost, tuple(order))


def lazy_order(names: Sequence[str], objective: Objective, most: int, width: int = VARIANTS_PER_PACK) -> list[str]:
    """Up to `most` names in the order in which they lower the objective; `width` are tried at a time, ties go by `names`."""
    chosen: list[str] = []
    (value,) = objective([()])
    last_gain = dict.fromkeys(names, inf)
    while last_gain and len(chosen) < most:
        gains = _try(tuple(chosen), value, last_gain, objective, width)
        last_gain |= gains
        best = max((name for name in names if name in gains), key=lambda name: gains[name])
        if gains[best] < LEAST_GAIN:
            break
        chosen.append(best)
        value -= last_gain.pop(best)
    return chosen


def _try(chosen: tuple[str, ...], value: float, last_gain: dict[str, float], objective: Objective, width: int) -> dict[str, float]:
    """Gains now, of as many as it takes until no other promises more."""
    waiting = sorted(last_gain, key=lambda name: -last_gain[name])
    gains: dict[str, float] = {}
    while waiting and max(gains.values(), default=-inf) < max(LEAST_GAIN, last_gain[waiting[0]]):
        now, waiting = waiting[:width], waiting[width:]
        values = objective([(*chosen, name) for name in now])
        gains |= {name: value - found for name, found in zip(now, values, strict=True)}
    return gains
