"""The plan of a sweep: the ordered list of all variants, with what each is for.

The plan is a function of the recipe and the rankings alone. Top-K sets of one order nest, and neighbours in the plan differ by few
modules, so an evaluator that walks the plan moves few weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from types import MappingProxyType
from typing import Literal, Protocol

from transplant_ray.errors import RecipeError
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant
from transplant_ray.models.catalogue import Module, select_kind
from transplant_ray.recipe import SweepSpec

PlanRole = Literal["target", "source", "all", "trial", "control"]
ChannelScores = Mapping[str, Sequence[float]]
"""Module → score of each output channel."""


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
    channels: float | None = None
    """Share of the output channels of each chosen module; None where whole modules are meant."""
    penalty: float | None = None
    """What a fitted variant paid for what the guards lose."""
    name: str | None = None
    """What it is known by where it is no variant of the pair but a model of its own: a merge."""

    @property
    def id(self) -> str:
        return self.name or ("source" if self.role == "source" else self.variant.id)

    @property
    def label(self) -> str:
        return describe_point(self)

    @property
    def size(self) -> float:
        """Modules that it changes; one of which some channels change counts by their share."""
        return sum(_share(coefficient) for coefficient in self.variant.coefficients.values())


class Point(Protocol):
    """A point of the grid, planned or measured."""

    @property
    def role(self) -> str: ...
    @property
    def ranker(self) -> str | None: ...
    @property
    def kind(self) -> str | None: ...


NAMED = ("k", "alpha", "channels", "penalty", "seed")


def describe_point(point: Point) -> str:
    """A point of the grid for people, e.g. `lae ffn k=8`; a baseline by its role."""
    values = {name: getattr(point, name) for name in NAMED}
    if values["alpha"] == 1:
        del values["alpha"]
    parts = [point.ranker, point.kind, *(f"{name}={value}" for name, value in values.items() if value is not None)]
    return " ".join(part for part in parts if part) or ROLE_NAMES[point.role]


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


def plan_sweep(
    modules: Sequence[Module],
    orders: Mapping[str, Sequence[str]],
    sweep: SweepSpec,
    channels: Mapping[str, ChannelScores] = MappingProxyType({}),
    found: Sequence[Planned] = (),
) -> SweepPlan:
    """All variants of a sweep: baselines, trials, controls.

    `orders` gives for every ranker of the recipe all module names in score order, `channels` the scores of every output channel
    where a ranker has them, `found` the trials that a search came upon. RecipeError where a kind matches nothing.
    """
    kinds = _members(modules, sweep.kind)
    everything = [module.name for module in modules]
    entries = [Planned("target", ORIGIN), Planned("source", ORIGIN), Planned("all", Variant.uniform(everything))]
    for ranker, order in orders.items():
        entries += _top_k("trial", ranker, order, kinds, sweep.k, sweep.alpha, extrapolate=sweep.extrapolate)
        if ranker in channels:
            entries += _by_channel("trial", ranker, order, channels[ranker], kinds, sweep, sweep.alpha)
    entries += [*found, *_controls(modules, kinds, sweep), *_controls_of(found, modules, sweep)]
    trials = [entry for entry in entries if entry.role == "trial"]
    primary = _primary(trials, kinds, sweep)
    notes = tuple(_notes(kinds, sweep.k))
    arms = _arms([primary] if primary else trials, modules, sweep)
    return SweepPlan(tuple(entries), notes, tuple(arms), primary.label if primary else None)


def _members(modules: Sequence[Module], kinds: Iterable[str]) -> dict[str, frozenset[str]]:
    return {kind: frozenset(module.name for module in select_kind(modules, kind)) for kind in kinds}


def depth_order(modules: Sequence[Module]) -> list[str]:
    """Early layers first, by name within a layer."""
    return [module.name for module in sorted(modules, key=lambda module: (module.layer, module.name))]


def random_order(modules: Sequence[Module], seed: int) -> list[str]:
    order = sorted(module.name for module in modules)
    random.Random(seed).shuffle(order)
    return order


def random_channels(modules: Sequence[Module], seed: int) -> dict[str, tuple[float, ...]]:
    """A seeded score for every channel."""
    rng = random.Random(f"channels {seed}")
    return {module.name: tuple(rng.random() for _ in range(module.num_channels)) for module in modules}


def _controls(modules: Sequence[Module], kinds: Mapping[str, frozenset[str]], sweep: SweepSpec) -> Iterator[Planned]:
    yield from _top_k("control", "depth", depth_order(modules), kinds, sweep.k, (1.0,))
    for seed in range(sweep.controls.random):
        order = random_order(modules, seed)
        yield from _top_k("control", "random", order, kinds, sweep.k, (1.0,), seed)
        if sweep.channels:
            yield from _by_channel("control", "random", order, random_channels(modules, seed), kinds, sweep, (1.0,), seed)
    names = [module.name for module in modules]
    for alpha in sweep.controls.alpha:
        yield Planned("control", Variant.uniform(names, alpha), "uniform", "all", len(names), alpha)


def _controls_of(found: Sequence[Planned], modules: Sequence[Module], sweep: SweepSpec) -> Iterator[Planned]:
    """What a search came upon has no size of the grid: random sets of its own size, kind and share of channels, a seed for each."""
    for place, point in enumerate(found):
        for seed in range(place * sweep.controls.random, (place + 1) * sweep.controls.random):
            yield from _random_sets([point], modules, seed, random.Random(f"control {seed}"))


def _primary(trials: Sequence[Planned], kinds: Mapping[str, frozenset[str]], sweep: SweepSpec) -> Planned | None:
    """The trial that the recipe names; its K is clipped as the grid's is."""
    if sweep.primary is None:
        return None
    named = sweep.primary
    point = (named.by, named.kind, min(named.k, len(kinds[named.kind])))
    return next(t for t in trials if (t.ranker, t.kind, t.k) == point and t.channels is None)


def _arms(points: Sequence[Planned], modules: Sequence[Module], sweep: SweepSpec) -> Iterator[tuple[Planned, ...]]:
    for arm in range(sweep.num_arms):
        yield tuple(_random_sets(points, modules, arm, random.Random(f"arm {arm}")))


def _random_sets(points: Sequence[Planned], modules: Sequence[Module], seed: int, rng: random.Random) -> Iterator[Planned]:
    """A random set of its own for every point."""
    kinds = _members(modules, {str(point.kind) for point in points})
    widths = {module.name: module.num_channels for module in modules}
    for point in points:
        yield replace(point, role="control", ranker="random", seed=seed, variant=_random_set(point, kinds, widths, rng))


def _random_set(point: Planned, kinds: Mapping[str, frozenset[str]], widths: Mapping[str, int], rng: random.Random) -> Variant:
    """Other modules of the same kind, each with as many channels as the one whose place it takes."""
    coefficients = sorted(point.variant.coefficients.values(), key=_share, reverse=True)
    names = rng.sample(sorted(kinds[str(point.kind)]), len(coefficients))
    pairs = zip(names, coefficients, strict=True)
    return Variant({n: _shuffled(c, widths[n], rng) for n, c in pairs}, point.variant.extrapolate)


def _shuffled(coefficient: Coefficient, width: int, rng: random.Random) -> Coefficient:
    """The same share of channels, others of them."""
    if not isinstance(coefficient, tuple):
        return coefficient
    chosen = set(rng.sample(range(width), _count(_share(coefficient), width)))
    largest = max(coefficient)
    return tuple(largest if channel in chosen else 0.0 for channel in range(width))


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


def _by_channel(
    role: PlanRole,
    ranker: str,
    order: Sequence[str],
    scores: ChannelScores,
    kinds: Mapping[str, frozenset[str]],
    sweep: SweepSpec,
    alphas: Sequence[float],
    seed: int | None = None,
) -> Iterator[Planned]:
    """Of each of the K modules, the channels with the largest scores."""
    for kind, members in kinds.items():
        chosen = [name for name in order if name in members]
        for k in sorted({min(k, len(chosen)) for k in sweep.k}):
            for share, alpha in product(sweep.channels, alphas):
                taken = {name: top_channels(scores[name], share, alpha) for name in chosen[:k]}
                yield Planned(role, Variant(taken, sweep.extrapolate), ranker, kind, k, alpha, seed, share)


def top_channels(scores: Sequence[float], share: float, alpha: float = 1.0) -> tuple[float, ...]:
    """`alpha` for this share of the channels, rounded up, the largest first and ties in their order; 0 for the others."""
    order = sorted(range(len(scores)), key=lambda channel: (-scores[channel], channel))
    chosen = set(order[: _count(share, len(scores))])
    return tuple(alpha if channel in chosen else 0.0 for channel in range(len(scores)))


def _notes(kinds: Mapping[str, frozenset[str]], ks: Sequence[int]) -> Iterator[str]:
    for kind, members in kinds.items():
        if clipped := [k for k in ks if k > len(members)]:
            yield f"kind {kind}: {len(members)} compatible modules; K {', '.join(map(str, clipped))} clipped to {len(members)}"


def num_parameters(variant: Variant, modules: Mapping[str, Module]) -> int:
    """Parameters that the variant changes; channels with coefficient 0 do not count."""
    total = 0
    for name, coefficient in variant.coefficients.items():
        module = modules[name]
        total += round(_share(coefficient) * module.num_parameters)
    return total


def _count(share: float, width: int) -> int:
    """Channels, rounded up; 10 % of 30 are 3, whatever floating point makes of it."""
    return ceil(share * width - 1e-9)


def _share(coefficient: Coefficient) -> float:
    """Of the channels of a module, those that change."""
    return sum(c != 0 for c in coefficient) / len(coefficient) if isinstance(coefficient, tuple) else 1.0


def check_orders(orders: Mapping[str, Sequence[str]], modules: Sequence[Module]) -> None:
    """Every order must be a permutation of the compatible modules."""
    names = {module.name for module in modules}
    for ranker, order in orders.items():
        if set(order) != names or len(order) != len(names):
            raise RecipeError(f"ranking {ranker}: {len(order)} modules, expected the {len(names)} compatible ones, each once.")
