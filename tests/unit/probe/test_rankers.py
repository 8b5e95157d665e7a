"""Rankers are pure functions; rankings repeat, and survive their table."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray import recipe
from transplant_ray.errors import DataError
from transplant_ray.evaluate.scorers import FORCED, LOSS, SCORERS
from transplant_ray.graft.plan import depth_order, random_order
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.probe import rankers
from transplant_ray.probe.measured import Measured
from transplant_ray.probe.rankers import RANKERS, SCHEMA, Evidence, Ranking, rank, ranking_rows, read_rankings
from transplant_ray.probe.resident_rankers import RESIDENT
from transplant_ray.probe.statistics import ActivationStats
from transplant_ray.tables import read_rows, write_rows

MODULES = [
    Module(f"model.layers.{layer}.{path}", layer, path, Role(kind, projection), (4, 4), False, "F32", path, None)  # type: ignore[arg-type]
    for layer in (0, 1, 2, 10)
    for path, kind, projection in (("mlp.up_proj", "ffn", "up"), ("self_attn.q_proj", "attn", "q"))
]
NAMES = tuple(module.name for module in MODULES)


@st.composite
def stats(draw: st.DrawFn) -> ActivationStats:
    keys = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, unique=True))
    return stats_of(keys, draw(st.integers(0, 10**6)))


def stats_of(keys: list[tuple[str, int]], seed: int = 0) -> ActivationStats:
    return ActivationStats(NAMES, tuple(keys), np.random.default_rng(seed).random((len(keys), len(NAMES)), dtype=np.float32))


def rows_of(stats: ActivationStats) -> dict[tuple[str, int], list[float]]:
    return dict(zip(stats.keys, stats.values.tolist(), strict=True))


def take(stats: ActivationStats, rows: list[int]) -> ActivationStats:
    return ActivationStats(stats.modules, tuple(stats.keys[row] for row in rows), stats.values[rows])


@settings(max_examples=30, deadline=None)
@given(stats(), st.randoms(use_true_random=False))
def test_parts_merge_in_any_order_and_any_number_of_times(whole: ActivationStats, rng: random.Random) -> None:
    rows = list(range(len(whole.keys)))
    cuts = [[row for row in rows if row % 3 == part] for part in range(3)]
    parts = [take(whole, chosen) for chosen in [*cuts, rows[:2], rows[-1:]] if chosen]
    merged = ActivationStats.merge(rng.sample(parts, len(parts)))
    assert len(set(merged.keys)) == len(merged.keys)
    assert rows_of(merged) == rows_of(whole)
    assert rows_of(ActivationStats.merge([merged, whole, merged])) == rows_of(whole)
    assert rows_of(ActivationStats.merge([merged])) == rows_of(whole)


@settings(max_examples=30, deadline=None)
@given(stats(), stats(), st.randoms(use_true_random=False))
def test_lae_joins_on_example_and_step_never_on_position(
    source: ActivationStats, target: ActivationStats, rng: random.Random
) -> None:
    shared = [key for key in source.keys if key in target.keys]
    shuffled = take(target, rng.sample(range(len(target.keys)), len(target.keys)))
    if not shared:
        with pytest.raises(DataError, match="source and target share no decode step"):
            rank("lae", Evidence(MODULES, 0, source, shuffled))
        return
    ours, theirs = rows_of(source), rows_of(target)
    expected = [sum(abs(ours[key][column] - theirs[key][column]) for key in shared) / len(shared) for column in range(len(NAMES))]
    scores = rank("lae", Evidence(MODULES, 0, source, shuffled)).scores
    assert scores == pytest.approx(dict(zip(NAMES, expected, strict=True)))


@pytest.mark.parametrize("side", ["source", "target"])
def test_lae_without_statistics_says_so(side: str) -> None:
    with pytest.raises(DataError, match="ranker lae: no activation statistics were measured"):
        rank("lae", Evidence(MODULES, 0, **{side: stats_of([("a", 1)])}))


def test_the_largest_score_leads_and_ties_go_by_layer_then_name(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = dict.fromkeys(reversed(NAMES), 1.0) | {NAMES[5]: 2.0, NAMES[0]: 0.5}
    monkeypatch.setattr(rankers, "RANKERS", {"given": lambda _: Measured(scores)})
    tied = sorted((m for m in MODULES if m.name not in (NAMES[5], NAMES[0])), key=lambda m: (m.layer, m.name))
    assert rank("given", Evidence(MODULES, 0)).order == [NAMES[5], *(m.name for m in tied), NAMES[0]]
    assert [m.layer for m in tied][-2:] == [10, 10]  # after 2: by number, not as text


def test_depth_needs_no_data_and_goes_up_the_layers() -> None:
    ranking = rank("depth", Evidence(MODULES, 0))
    assert ranking.order == depth_order(MODULES)
    assert [name.split(".")[2] for name in ranking.order] == ["0", "0", "1", "1", "2", "2", "10", "10"]
    assert len(set(ranking.scores.values())) == len(NAMES)


def test_random_is_a_permutation_that_the_seed_decides() -> None:
    orders = [rank("random", Evidence(MODULES, seed)).order for seed in range(4)]
    assert orders == [random_order(MODULES, seed) for seed in range(4)]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def random_scores(seed: int) -> dict[str, float]:
    return dict(zip(NAMES, np.random.default_rng(seed).normal(size=len(NAMES)).tolist(), strict=True))


@settings(max_examples=20, deadline=None)
@given(stats(), st.integers(0, 10**6))
def test_lae_relative_is_lae_over_how_much_the_source_says(source: ActivationStats, seed: int) -> None:
    evidence = Evidence(MODULES, 0, source, stats_of(list(source.keys), seed))
    plain, relative = (rank(ranker, evidence).scores for ranker in ("lae", "lae_relative"))
    level = dict(zip(NAMES, source.values.mean(axis=0, dtype=np.float64).tolist(), strict=True))
    assert relative == pytest.approx({name: plain[name] / level[name] for name in NAMES})


@pytest.mark.parametrize("ranker", ["depth", "random", "attribution"])
def test_a_reversed_ranking_is_upside_down_ties_too(ranker: str) -> None:
    evidence = Evidence(MODULES, 0, resident={"attribution": Measured(dict.fromkeys(NAMES, 1.0) | {NAMES[3]: 2.0})})
    upright, reverse = rank(ranker, evidence), rank(f"reverse:{ranker}", evidence)
    assert reverse.order == upright.order[::-1]
    assert reverse.scores == {name: -score for name, score in upright.scores.items()}
    assert reverse.ranker == f"reverse:{ranker}"


def test_rankings_survive_their_table(tmp_path: Path) -> None:
    resident = {ranker: Measured(random_scores(seed)) for seed, ranker in enumerate(sorted(recipe.RESIDENT_RANKERS))}
    evidence = Evidence(MODULES, 3, stats_of([("a", 1), ("b", 2)]), stats_of([("b", 2)], seed=1), resident)
    rankings = [rank(ranker, evidence) for ranker in RANKERS]
    write_rows(tmp_path / "rankings.parquet", ranking_rows(rankings, MODULES), SCHEMA)
    rows = read_rows(tmp_path / "rankings.parquet")
    again = read_rankings(rows)
    assert again == rankings
    assert [ranking.order for ranking in again] == [ranking.order for ranking in rankings]
    assert [row["rank"] for row in rows] == list(range(1, len(NAMES) + 1)) * len(RANKERS)


def test_the_table_says_where_each_module_is() -> None:
    rows = ranking_rows([Ranking("lae", {NAMES[1]: 2.0, NAMES[6]: 1.0})], MODULES)
    assert rows == [
        {"ranker": "lae", "rank": 1, "module": NAMES[1], "layer": 0, "kind": "attn", "projection": "q", "score": 2.0},
        {"ranker": "lae", "rank": 2, "module": NAMES[6], "layer": 10, "kind": "ffn", "projection": "up", "score": 1.0},
    ]


def test_the_recipe_knows_the_same_rankers_and_scorers_as_the_code() -> None:
    assert set(recipe.RANKERS) == set(RANKERS)
    assert set(recipe.SCORERS) == {*SCORERS, FORCED, LOSS, "choice"}
    assert set(RESIDENT) == recipe.RESIDENT_RANKERS


@pytest.mark.parametrize("ranker", recipe.RANKERS)
def test_the_recipe_knows_which_rankers_have_to_be_measured(ranker: str) -> None:
    if ranker in recipe.ACTIVATION_RANKERS | recipe.RESIDENT_RANKERS:
        with pytest.raises(DataError, match=f"ranker {ranker}: .*measured"):
            rank(ranker, Evidence(MODULES, 0))
    else:
        assert rank(ranker, Evidence(MODULES, 0)).scores
