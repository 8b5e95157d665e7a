"""What a comparison of learners shows: which learning rate each gets, how they differ over seeds, early against late positions.

Everything is decided in losses (nats a token, logarithms of perplexities): they add up, and perplexities do not. Differences are
paired by seed and by block, and their intervals are for other seeds on other text of that kind: a seed moves little beside a
training on the same text, so that an interval over seeds alone would call nearly every difference real. Intervals are at 95 %, and
not corrected for their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np

from transplant_ray.evaluate.loss_tests import compare_losses
from transplant_ray.evaluate.metrics import crossed_interval, mean_interval
from transplant_ray.organ.lessons import TEXTS, Learnt

PAIRS = (("organ", "lora"), ("organ", "full"), ("organ", "in_place"), ("in_place", "full"), ("lora", "full"))
"""What is held against what, decided before anything is measured."""
SPOKEN = {"organ": "the organ", "lora": "LoRA", "full": "full fine-tuning", "in_place": "the layers in place"}
PLURAL = (SPOKEN["in_place"], "early positions")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Rate:
    lr: float
    loss: float | None
    """On `select` of the domain text; None where the training failed."""
    error: str | None


@dataclass(frozen=True)
class Choice:
    """The learning rate of one method."""

    model: str
    method: str
    lr: float | None
    """None where every training has failed."""
    at_edge: bool
    """Whether it is the lowest or highest of the grid, so that a wider one might have found a better."""
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Standing:
    """One method on one model, over its seeds."""

    model: str
    method: str
    lr: float
    seeds: tuple[int, ...]
    """That were trained to the end."""
    failed: tuple[int, ...]
    loss: dict[str, float]
    """By text, on `test`: the mean over the seeds."""
    interval: dict[str, Interval]
    """None with a single seed."""
    change: dict[str, float]
    """By text: loss after − before; on general text that is the price."""
    change_interval: dict[str, Interval]
    sites: tuple[str, ...]
    """Of each seed, where the organ was put in."""
    parameters: int
    bytes: int
    seconds: float
    """Of training, mean over the seeds."""
    seconds_interval: Interval
    """Student's, from 0 up."""
    memory: int | None


@dataclass(frozen=True)
class WithinSeed:
    seed: int
    n: int
    """Blocks."""
    difference: float
    p: float
    """Two-sided, of the paired t-test."""


@dataclass(frozen=True)
class Difference:
    """One method against another on one text."""

    model: str
    text: str
    first: str
    second: str
    n: int
    """Seeds that both have."""
    difference: float
    """Loss of the first − of the second: below 0 the first is better."""
    interval: Interval
    """Over seeds and blocks; None with a single seed."""
    within: tuple[WithinSeed, ...]
    verdict: str


@dataclass(frozen=True)
class Contrast:
    """Positions of the first half of a model against those of the second, for one mode; the one in the middle is in neither."""

    model: str
    mode: str
    n: int
    """Seeds."""
    early: float
    late: float
    """Mean domain loss on `select`, over positions and seeds."""
    difference: float
    """Late − early: above 0 early positions are better."""
    interval: Interval
    verdict: str


@dataclass(frozen=True)
class Findings:
    choices: tuple[Choice, ...]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    contrasts: tuple[Contrast, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find(before: Sequence[Learnt], tuned: Sequence[Learnt], confirmed: Sequence[Learnt]) -> Findings:
    """`before`: the recipients as they are; `tuned` and `confirmed`: the trainings, failed ones among them."""
    choices = tuple(choose_rates(tuned))
    start = {learnt.model: learnt for learnt in before}
    lessons = _by_method(confirmed)
    standings = tuple(_standing(start[model], group) for (model, _), group in lessons.items() if _well(group))
    differences = tuple(
        _difference(model, text, (first, lessons[model, first]), (second, lessons[model, second]))
        for model in start
        for first, second in PAIRS
        for text in TEXTS
        if _shared(lessons.get((model, first), []), lessons.get((model, second), []))
    )
    return Findings(choices, standings, differences, tuple(_contrasts(confirmed)))


def choose_rates(tuned: Iterable[Learnt]) -> list[Choice]:
    """Per model and method the learning rate of the lowest loss on `select`; of equal ones the lowest rate."""
    return [_choice(model, method, group) for (model, method), group in _by_method(tuned).items()]


def _choice(model: str, method: str, group: Sequence[Learnt]) -> Choice:
    ordered = sorted(group, key=lambda learnt: learnt.lr or 0.0)
    rates = tuple(Rate(learnt.lr or 0.0, learnt.select, learnt.error) for learnt in ordered)
    finite = [rate for rate in rates if rate.loss is not None]
    if not finite:
        return Choice(model, method, None, False, rates)
    best = min(finite, key=lambda rate: rate.loss or 0.0)
    return Choice(model, method, best.lr, len(rates) > 1 and best in (rates[0], rates[-1]), rates)


def _standing(before: Learnt, group: Sequence[Learnt]) -> Standing:
    well = _well(group)
    losses = {text: [learnt.mean(text) or 0.0 for learnt in well] for text in TEXTS}
    changes = {text: [loss - (before.mean(text) or 0.0) for loss in losses[text]] for text in TEXTS}
    seconds = [learnt.seconds for learnt in well]
    ends = mean_interval(seconds)
    return Standing(
        model=group[0].model,
        method=group[0].method,
        lr=group[0].lr or 0.0,
        seeds=tuple(learnt.seed or 0 for learnt in well),
        failed=tuple(learnt.seed or 0 for learnt in group if learnt.error is not None),
        loss={text: fmean(losses[text]) for text in TEXTS},
        interval={text: mean_interval(losses[text]) for text in TEXTS},
        change={text: fmean(changes[text]) for text in TEXTS},
        change_interval={text: mean_interval(changes[text]) for text in TEXTS},
        sites=tuple(learnt.site for learnt in well if learnt.site is not None),
        parameters=well[0].parameters,
        bytes=round(fmean(learnt.bytes for learnt in well)),
        seconds=fmean(seconds),
        seconds_interval=None if ends is None else (max(0.0, ends[0]), ends[1]),
        memory=max((learnt.memory for learnt in well if learnt.memory is not None), default=None),
    )


def _difference(model: str, text: str, first: tuple[str, Sequence[Learnt]], second: tuple[str, Sequence[Learnt]]) -> Difference:
    pairs = _shared(first[1], second[1])
    differences_SB = np.array([np.subtract(ours.test[text], theirs.test[text]) for ours, theirs in pairs])
    mean, interval = float(differences_SB.mean()), crossed_interval(differences_SB.tolist())
    return Difference(
        model=model,
        text=text,
        first=first[0],
        second=second[0],
        n=len(pairs),
        difference=mean,
        interval=interval,
        within=tuple(_within(ours, theirs, text) for ours, theirs in pairs),
        verdict=_better(SPOKEN[first[0]], SPOKEN[second[0]], mean, interval, f"on {text} text"),
    )


def _within(ours: Learnt, theirs: Learnt, text: str) -> WithinSeed:
    """Blocks of one training against those of the other; scores are minus losses."""
    test = compare_losses(-np.array(theirs.test[text]), -np.array(ours.test[text]))
    return WithinSeed(ours.seed or 0, test.n, -test.difference, test.p)


def _contrasts(confirmed: Iterable[Learnt]) -> list[Contrast]:
    found = []
    for (model, method), group in _by_method(confirmed).items():
        modes = dict.fromkeys(site.mode for learnt in _well(group) for site in learnt.sites)
        for mode in modes if method == "organ" else ():
            halves = [both for learnt in _well(group) if (both := early_and_late(learnt, mode)) is not None]
            if halves:
                early_SB, late_SB = np.array(halves).transpose(1, 0, 2)
                interval = crossed_interval((late_SB - early_SB).tolist())
                early, late = float(early_SB.mean()), float(late_SB.mean())
                verdict = _better("early positions", "late ones", early - late, _turned(interval), f"to {mode}")
                found.append(Contrast(model, mode, len(halves), early, late, late - early, interval, verdict))
    return found


def early_and_late(learnt: Learnt, mode: str) -> tuple[list[float], list[float]] | None:
    """Of every block the mean losses over the first half of the positions and over the second.

    None where there are too few, or one is no number.
    """
    sites = [site for site in sorted(learnt.sites, key=lambda site: site.at) if site.mode == mode]
    half = len(sites) // 2
    if not half or any(site.loss is None for site in sites):
        return None
    losses = np.array([site.blocks for site in sites])
    return losses[:half].mean(0).tolist(), losses[-half:].mean(0).tolist()


def _better(first: str, second: str, difference: float, interval: Interval, where: str) -> str:
    """`difference`: loss of the first − of the second."""
    if interval is None:
        return f"{first} against {second} {where}: a single seed, so nothing can be said of chance"
    low, high = interval
    are = "are" if first in PLURAL else "is"
    if low <= 0 <= high:
        return f"{first} and {second} cannot be told apart {where}"
    return f"{first} {are} {'better' if difference < 0 else 'worse'} than {second} {where}"


def _turned(interval: Interval) -> Interval:
    return None if interval is None else (-interval[1], -interval[0])


def _by_method(lessons: Iterable[Learnt]) -> dict[tuple[str, str], list[Learnt]]:
    """In the order in which they come."""
    found: dict[tuple[str, str], list[Learnt]] = {}
    for (model, method), group in groupby(lessons, key=lambda learnt: (learnt.model, learnt.method)):
        found.setdefault((model, method), []).extend(group)
    return found


def _well(group: Iterable[Learnt]) -> list[Learnt]:
    return [learnt for learnt in group if learnt.error is None]


def _shared(ours: Iterable[Learnt], theirs: Iterable[Learnt]) -> list[tuple[Learnt, Learnt]]:
    """The same seed of both."""
    others = {learnt.seed: learnt for learnt in _well(theirs)}
    return [(learnt, others[learnt.seed]) for learnt in _well(ours) if learnt.seed in others]
