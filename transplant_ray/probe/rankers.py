"""Rankings: every module's score by a ranker, from what was measured, and as a table.

lae            mean |a_source − a_target| over the decode steps that both models took    eq. 5–6 of arXiv:2602.16189
lae_relative   the same, over the mean of a_source
depth          earlier layers first: needs no data, and is what any ranker must beat
random         a seeded permutation
reverse:NAME   the ranking of another ranker upside down

and those of `resident_rankers`, which were measured where both models are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from transplant_ray.errors import DataError
from transplant_ray.graft.plan import depth_order, random_order
from transplant_ray.models.catalogue import Module
from transplant_ray.probe.measured import Measured, Sample, Scores
from transplant_ray.probe.resident_rankers import RESIDENT
from transplant_ray.probe.statistics import ActivationStats
from transplant_ray.recipe import REVERSE


@dataclass(frozen=True)
class Evidence:
    """What rankers may look at. Statistics are None where no ranker of the recipe measures activations."""

    modules: Sequence[Module]
    seed: int
    source: ActivationStats | None = None
    target: ActivationStats | None = None
    resident: Mapping[str, Measured] = field(default_factory=dict)
    """What rankers found that need both models in one place, by ranker."""


@dataclass(frozen=True)
class Ranking:
    ranker: str
    scores: Scores
    """Module → score, best first; ties by layer, then by name."""
    measured: Measured | None = field(default=None, compare=False)
    """What it comes from; None for one that was read from a table."""

    @property
    def order(self) -> list[str]:
        return list(self.scores)


def rank(ranker: str, evidence: Evidence) -> Ranking:
    if ranker.startswith(REVERSE):
        upright = rank(ranker.removeprefix(REVERSE), evidence)
        return Ranking(ranker, {name: -upright.scores[name] for name in reversed(upright.order)}, upright.measured)
    measured = RANKERS[ranker](evidence)
    return Ranking(ranker, in_order(measured.scores, evidence.modules), measured)


def in_order(scores: Scores, modules: Sequence[Module]) -> dict[str, float]:
    """Best first; ties by layer, then by name."""
    layers = {module.name: module.layer for module in modules}
    order = sorted(scores, key=lambda name: (-scores[name], layers[name], name))
    return {name: float(scores[name]) for name in order}


def lae(evidence: Evidence) -> Measured:
    """Locally averaged activation difference, pooled over (example, step); a step counts while neither model has finished.

    Float64 sums. DataError where the two models share no step.
    """
    source, target, keys = _shared_steps(evidence, "lae")
    return Measured.of(_by_example(evidence, keys, np.abs(source - target)))


def lae_relative(evidence: Evidence) -> Measured:
    source, target, keys = _shared_steps(evidence, "lae_relative")
    return Measured.of(_by_example(evidence, keys, np.abs(source - target) / np.maximum(source.mean(axis=0), TINY)))


def depth(evidence: Evidence) -> Measured:
    return Measured(_by_position(depth_order(evidence.modules)))


def random(evidence: Evidence) -> Measured:
    return Measured(_by_position(random_order(evidence.modules, evidence.seed)))


def _resident(ranker: str, evidence: Evidence) -> Measured:
    if ranker not in evidence.resident:
        raise DataError(f"ranker {ranker}: it was not measured.")
    return evidence.resident[ranker]


RANKERS: Mapping[str, Callable[[Evidence], Measured]] = MappingProxyType(
    {
        "lae": lae,
        "lae_relative": lae_relative,
        "depth": depth,
        "random": random,
        **{ranker: partial(_resident, ranker) for ranker in RESIDENT},
    }
)
TINY = 1e-12
"""In place of an activation that is always 0."""

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


def _shared_steps(evidence: Evidence, ranker: str) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int]]]:
    """Activations of source and target (N, M), float64, at the steps that both took, and the keys of those."""
    source, target = evidence.source, evidence.target
    if source is None or target is None:
        raise DataError(f"ranker {ranker}: no activation statistics were measured.")
    row_of = {key: row for row, key in enumerate(source.keys)}
    shared = [(row_of[key], row) for row, key in enumerate(target.keys) if key in row_of]
    if not shared:
        raise DataError(f"ranker {ranker}: source and target share no decode step. Is the probe set the same for both?")
    rows_source, rows_target = map(list, zip(*shared, strict=True))
    keys = [target.keys[row] for row in rows_target]
    return source.values[rows_source].astype(np.float64), target.values[rows_target].astype(np.float64), keys


def _by_example(evidence: Evidence, keys: Sequence[tuple[str, int]], values_NM: np.ndarray) -> Sample:
    """Means over the steps of each example, weighted by their number: their mean is the mean over all steps."""
    assert evidence.source is not None
    examples = {example: place for place, example in enumerate(dict.fromkeys(example for example, _ in keys))}
    owner_N = np.array([examples[example] for example, _ in keys])
    sums_EM = np.zeros((len(examples), values_NM.shape[1]))
    np.add.at(sums_EM, owner_N, values_NM)
    steps_E = np.bincount(owner_N, minlength=len(examples)).astype(np.float64)
    return Sample(evidence.source.modules, sums_EM / steps_E[:, None], steps_E)


def _by_position(order: Sequence[str]) -> Scores:
    return {name: float(len(order) - position) for position, name in enumerate(order)}
