"""The plan of a sweep: the ordered list of all variants, with what each is for.

The plan is a function of the recipe and the rankings alone. Top-K sets of one order nest, and neighbours in the plan differ by few
modules, so an evaluator that walks the plan moves few weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transplant_ray.errors import RecipeError
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.catalogue import Module, select_kind
from transplant_ray.recipe import SweepSpec

PlanRole = Literal["target", "source", "all", "trial", "control"]


@dataclass(frozen=True)
class Planned:
    """A variant and its place in the grid. `source` has no variant of its own: it is another model."""

    role: PlanRole
    variant: Variant
    ranker: str | None = None
    kind: str | None = None
    k: int | None = None
    alpha: float | None = None
    seed: int | None = None

    @property
    def id(self) -> str:
        return "source" if self.role == "source" else self.variant.id

    @property
    def label(self) -> str:
        return describe_point(self.role, self.ranker, self.kind, self.k, self.alpha, self.seed)


def describe_point(role: str, ranker: str | None, kind: str | None, k: int | None, alpha: float | None, seed: int | None) -> str:
    """A point of the grid for people, e.g. `lae ffn k=8`; a baseline by its role."""
    named = {"k": k, "alpha": None if alpha == 1 else alpha, "seed": seed}
    parts = [ranker, kind, *(f"{name}={value}" for name, value in named.items() if value is not None)]
    return " ".join(part for part in parts if part) or ROLE_NAMES[role]


ROLE_NAMES = {"target": "target", "source": "source", "all": "all swapped"}


@dataclass(frozen=True)
class SweepPlan:
    entries: tuple[Planned, ...]
    notes: tuple[str, ...]
    """What was clipped, in words."""
    arms: tuple[tuple[Planned, ...], ...] = ()
    """What chance may choose from: for every arm as many random sets as there are trials, of their sizes and kinds."""
    primary: str | None = None
    """Label of the trial that was named beforehand."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant that the target takes, once, in the order of the plan."""
        return tuple({e.variant.id: e.variant for e in self.entries if e.role != "source"}.values())

    @property
    def racers(self) -> tuple[Variant, ...]:
        """Variants of trials alone: those that may be stopped early, for no baseline or control is the same."""
        others = {entry.variant.id for entry in self.entries if entry.role not in ("trial", "source")}
        return tuple({e.variant.id: e.variant for e in self.trials if e.variant.id not in others}.values())

    @property
    def trials(self) -> tuple[Planned, ...]:
        return tuple(entry for entry in self.entries if entry.role == "trial")

    def trial(self, label: str) -> Planned:
        return next(entry for entry in self.trials if entry.label == label)

    def find(self, variant_id: str) -> Planned | None:
        return next((entry for entry in self.entries if entry.id == variant_id), None)


def plan_sweep(modules: Sequence[Module], orders: Mapping[str, Sequence[str]], sweep: SweepSpec) -> SweepPlan:
    """All variants of a sweep: baselines, trials, controls.

    `orders` gives for every ranker of the recipe, and for the controls, all module names in score order. RecipeError where a kind
    matches nothing.
    """
    kinds = {kind: frozenset(m.name for m in select_kind(modules, kind)) for kind in sweep.kind}
    everything = [module.name for module in modules]
    entries = [Planned("target", ORIGIN), Planned("source", ORIGIN), Planned("all", Variant.uniform(everything))]
    for ranker, order in orders.items():
        entries += _top_k("trial", ranker, order, kinds, sweep.k, sweep.alpha, extrapolate=sweep.extrapolate)
    entries += _controls(modules, kinds, sweep)
    trials = [entry for entry in entries if entry.role == "trial"]
    primary = _primary(trials, kinds, sweep)
    arms = _arms([primary] if primary else trials, kinds, sweep)
    return SweepPlan(tuple(entries), tuple(_notes(kinds, sweep.k)), tuple(arms), primary.label if primary else None)


def depth_order(modules: Sequence[Module]) -> list[str]:
    """Early layers first, by name within a layer."""
    return [module.name for module in sorted(modules, key=lambda module: (module.layer, module.name))]


def random_order(modules: Sequence[Module], seed: int) -> list[str]:
    order = sorted(module.name for module in modules)
    random.Random(seed).shuffle(order)
    return order


def _controls(modules: Sequence[Module], kinds: Mapping[str, frozenset[str]], sweep: SweepSpec) -> Iterator[Planned]:
    yield from _top_k("control", "depth", depth_order(modules), kinds, sweep.k, (1.0,))
    for seed in range(sweep.controls.random):
        yield from _top_k("control", "random", random_order(modules, seed), kinds, sweep.k, (1.0,), seed)
    names = [module.name for module in modules]
    for alpha in sweep.controls.alpha:
        yield Planned("control", Variant.uniform(names, alpha), "uniform", "all", len(names), alpha)


def _primary(trials: Sequence[Planned], kinds: Mapping[str, frozenset[str]], sweep: SweepSpec) -> Planned | None:
    """The trial that the recipe names; its K is clipped as the grid's is."""
    if sweep.primary is None:
        return None
    named = sweep.primary
    point = (named.by, named.kind, min(named.k, len(kinds[named.kind])))
    return next(trial for trial in trials if (trial.ranker, trial.kind, trial.k) == point)


def _arms(points: Sequence[Planned], kinds: Mapping[str, frozenset[str]], sweep: SweepSpec) -> Iterator[tuple[Planned, ...]]:
    """A random set of its own for every point."""
    for arm in range(sweep.num_arms):
        rng = random.Random(f"arm {arm}")
        yield tuple(
            replace(point, role="control", ranker="random", seed=arm, variant=_random_set(point, kinds, rng, sweep))
            for point in points
        )


def _random_set(point: Planned, kinds: Mapping[str, frozenset[str]], rng: random.Random, sweep: SweepSpec) -> Variant:
    names = rng.sample(sorted(kinds[str(point.kind)]), point.k or 0)
    return Variant.uniform(names, point.alpha or 0, extrapolate=sweep.extrapolate)


def _top_k(
    role: PlanRole,
    ranker: str,
    order: Sequence[str],
    kinds: Mapping[str, frozenset[str]],
    ks: Sequence[int],
    alphas: Sequence[float],
    seed: int | None = None,
    *,
    extrapolate: bool = False,
) -> Iterator[Planned]:
    for kind, members in kinds.items():
        chosen = [name for name in order if name in members]
        for k in sorted({min(k, len(chosen)) for k in ks}):
            for alpha in alphas:
                variant = Variant.uniform(chosen[:k], alpha, extrapolate=extrapolate)
                yield Planned(role, variant, ranker, kind, k, alpha, seed)


def _notes(kinds: Mapping[str, frozenset[str]], ks: Sequence[int]) -> Iterator[str]:
    for kind, members in kinds.items():
        if clipped := [k for k in ks if k > len(members)]:
            yield f"kind {kind}: {len(members)} compatible modules; K {', '.join(map(str, clipped))} clipped to {len(members)}"


def num_parameters(variant: Variant, modules: Mapping[str, Module]) -> int:
    """Parameters that the variant changes; channels with coefficient 0 do not count."""
    total = 0
    for name, coefficient in variant.coefficients.items():
        module = modules[name]
        share = sum(c != 0 for c in coefficient) / len(coefficient) if isinstance(coefficient, tuple) else 1
        total += round(share * module.num_parameters)
    return total


def check_orders(orders: Mapping[str, Sequence[str]], modules: Sequence[Module]) -> None:
    """Every order must be a permutation of the compatible modules."""
    names = {module.name for module in modules}
    for ranker, order in orders.items():
        if set(order) != names or len(order) != len(names):
            raise RecipeError(f"ranking {ranker}: {len(order)} modules, expected the {len(names)} compatible ones, each once.")
