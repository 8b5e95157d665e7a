"""Rankers: pure functions that give every module a score, and rankings as a table.

lae      mean |a_source − a_target| over the decode steps that both models took    eq. 5–6 of arXiv:2602.16189
depth    earlier layers first: needs no data, and is what any ranker must beat
random   a seeded permutation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from transplant_ray.errors import DataError
from transplant_ray.graft.plan import depth_order, random_order
from transplant_ray.models.catalogue import Module
from transplant_ray.probe.statistics import ActivationStats

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """What rankers may look at. Statistics are None where no ranker of the recipe measures activations."""

    modules: Sequence[Module]
    seed: int
    source: ActivationStats | None = None
    target: ActivationStats | None = None


@dataclass(frozen=True)
class Ranking:
    ranker: str
    scores: Scores
    """Module → score, best first; ties by layer, then by name."""

    @property
    def order(self) -> list[str]:
        return list(self.scores)


def rank(ranker: str, evidence: Evidence) -> Ranking:
    scores = RANKERS[ranker](evidence)
    layers = {module.name: module.layer for module in evidence.modules}
    order = sorted(scores, key=lambda name: (-scores[name], layers[name], name))
    return Ranking(ranker, {name: float(scores[name]) for name in order})


def lae(evidence: Evidence) -> Scores:
    """Locally averaged activation difference, pooled over (example, step); a step counts while neither model has finished.

    Float64 sums. DataError where the two models share no step.
    """
    source, target = evidence.source, evidence.target
    if source is None or target is None:
        raise DataError("ranker lae: no activation statistics were measured.")
    row_of = {key: row for row, key in enumerate(source.keys)}
    shared = [(row_of[key], row) for row, key in enumerate(target.keys) if key in row_of]
    if not shared:
        raise DataError("ranker lae: source and target share no decode step. Is the probe set the same for both?")
    rows_source, rows_target = map(list, zip(*shared, strict=True))
    difference = np.abs(source.values[rows_source].astype(np.float64) - target.values[rows_target].astype(np.float64))
    return dict(zip(source.modules, difference.mean(axis=0).tolist(), strict=True))


def depth(evidence: Evidence) -> Scores:
    return _by_position(depth_order(evidence.modules))


def random(evidence: Evidence) -> Scores:
    return _by_position(random_order(evidence.modules, evidence.seed))


RANKERS: Mapping[str, Callable[[Evidence], Scores]] = MappingProxyType({"lae": lae, "depth": depth, "random": random})

SCHEMA = pa.schema(
    [
        ("ranker", pa.string()),
        ("rank", pa.int32()),
        ("module", pa.string()),
        ("layer", pa.int32()),
        ("kind", pa.string()),
        ("projection", pa.string()),
        ("score", pa.float64()),
    ]
)


def ranking_rows(rankings: Sequence[Ranking], modules: Sequence[Module]) -> list[dict[str, object]]:
    """Rows of rankings.parquet, rank from 1."""
    by_name = {module.name: module for module in modules}
    return [
        {
            "ranker": ranking.ranker,
            "rank": position,
            "module": name,
            "layer": by_name[name].layer,
            "kind": by_name[name].role.kind,
            "projection": by_name[name].role.projection,
            "score": score,
        }
        for ranking in rankings
        for position, (name, score) in enumerate(ranking.scores.items(), start=1)
    ]


def read_rankings(rows: Sequence[Mapping[str, object]]) -> list[Ranking]:
    """Inverse of `ranking_rows`."""
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        scores.setdefault(str(row["ranker"]), {})[str(row["module"])] = float(row["score"])  # type: ignore[arg-type]
    return [Ranking(ranker, by_module) for ranker, by_module in scores.items()]


def _by_position(order: Sequence[str]) -> Scores:
    return {name: float(len(order) - position) for position, name in enumerate(order)}
