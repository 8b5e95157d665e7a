"""How far rankings can be relied on: whether they agree, with each other and with plain depth, and whether other examples would
have given the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from statistics import mean

import numpy as np
from scipy.stats import spearmanr

from transplant_ray.graft.plan import depth_order
from transplant_ray.models.catalogue import Module
from transplant_ray.probe.measured import Scores
from transplant_ray.probe.rankers import Ranking, in_order

RESAMPLES = 200


@dataclass(frozen=True)
class Agreement:
    first: str
    second: str
    spearman: float | None
    """Rank correlation of the scores of all modules; None where one gives all the same."""
    overlap: Mapping[int, float]
    """K → share of the top K that both have; chance gives K ÷ the number of modules."""


@dataclass(frozen=True)
class Stability:
    """Means over resamples of the probe set, with replacement, each against the whole set."""

    spearman: float | None
    overlap: Mapping[int, float]
    num_examples: int
    resamples: int
    seed: int


def compare_rankings(rankings: Sequence[Ranking], ks: Sequence[int]) -> list[Agreement]:
    """Every pair of them."""
    return [
        Agreement(one.ranker, other.ranker, _spearman(one.scores, other.scores), _overlap(one.order, other.order, ks))
        for one, other in combinations(rankings, 2)
    ]


def spearman_with_depth(ranking: Ranking, modules: Sequence[Module]) -> float | None:
    """1 where early layers score highest, −1 where late ones do."""
    order = depth_order(modules)
    layers = {module.name: -float(module.layer) for module in modules}
    return _spearman(ranking.scores, {name: layers[name] for name in order})


def stability(ranking: Ranking, modules: Sequence[Module], ks: Sequence[int], seed: int) -> Stability | None:
    """None where the ranker does not look at examples one by one."""
    sample = ranking.measured.sample if ranking.measured else None
    if sample is None:
        return None
    rng, num_examples = np.random.default_rng(seed), len(sample.weight_E)
    drawn = [sample.scores_of(rng.integers(0, num_examples, num_examples)) for _ in range(RESAMPLES)]
    whole = list(in_order(sample.scores, modules))
    overlaps = [_overlap(whole, list(in_order(scores, modules)), ks) for scores in drawn]
    correlations = [_spearman(sample.scores, scores) for scores in drawn]
    known = [correlation for correlation in correlations if correlation is not None]
    return Stability(
        mean(known) if known else None, {k: mean(overlap[k] for overlap in overlaps) for k in ks}, num_examples, RESAMPLES, seed
    )


def _spearman(one: Scores, other: Scores) -> float | None:
    if len(one) < 2:
        return None
    first, second = ([scores[name] for name in one] for scores in (one, other))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    correlation = float(spearmanr(first, second).statistic)
    return None if isnan(correlation) else correlation


def _overlap(one: Sequence[str], other: Sequence[str], ks: Sequence[int]) -> dict[int, float]:
    return {k: len(set(one[:k]) & set(other[:k])) / min(k, len(one)) for k in ks}
