"""How far rankings can be relied on, against counts made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.probe.agreement import compare_rankings, spearman_with_depth, stability
from transplant_ray.probe.measured import Measured, Sample
from transplant_ray.probe.rankers import Evidence, Ranking, in_order, rank

MODULES = [Module(f"m.{i:02}", i // 2, "x", Role("ffn", "x"), (4, 4), False, "F32", "x", None) for i in range(12)]
NAMES = tuple(module.name for module in MODULES)


def ranking(name: str, values: list[float]) -> Ranking:
    return Ranking(name, in_order(dict(zip(NAMES, values, strict=True)), MODULES))


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; ties share their mean rank."""
    return [1 + sum(v < value for v in values) + (values.count(value) - 1) / 2 for value in values]


def test_agreement_is_the_correlation_of_ranks_and_a_share_of_the_top() -> None:
    rng = random.Random(0)
    first, second = ([float(rng.randrange(8)) for _ in NAMES] for _ in range(2))
    (found,) = compare_rankings([ranking("a", first), ranking("b", second)], (1, 5, 12, 99))
    assert (found.first, found.second) == ("a", "b")
    assert found.spearman == pytest.approx(np.corrcoef(ranks(first), ranks(second))[0, 1])
    tops = [set(ranking("", values).order[:5]) for values in (first, second)]
    assert found.overlap[5] == len(tops[0] & tops[1]) / 5
    assert found.overlap[12] == found.overlap[99] == 1


def test_a_ranking_that_says_nothing_has_no_correlation() -> None:
    (found,) = compare_rankings([ranking("a", [1.0] * 12), ranking("b", [float(i) for i in range(12)])], (3,))
    assert found.spearman is None


def test_depth_correlates_with_depth() -> None:
    depth = rank("depth", Evidence(MODULES, 0))
    assert spearman_with_depth(depth, MODULES) == pytest.approx(1, abs=0.02)  # modules of one layer tie in depth
    assert spearman_with_depth(rank("reverse:depth", Evidence(MODULES, 0)), MODULES) == pytest.approx(-1, abs=0.02)


def measured(values_EM: np.ndarray) -> Ranking:
    sample = Sample(NAMES, values_EM, np.ones(len(values_EM)))
    return Ranking("given", in_order(sample.scores, MODULES), Measured.of(sample))


def test_examples_that_all_say_the_same_make_a_stable_ranking() -> None:
    row = np.arange(12.0)
    found = stability(measured(np.stack([row, row, row])), MODULES, (4,), seed=1)
    assert found is not None
    assert (found.spearman, found.overlap[4], found.num_examples) == (pytest.approx(1), 1, 3)


def test_noise_makes_an_unstable_one_and_more_examples_a_steadier() -> None:
    rng = np.random.default_rng(0)
    signal = np.arange(12.0) / 4
    few, many = (stability(measured(signal + 8 * rng.normal(size=(n, 12))), MODULES, (4,), seed=1) for n in (6, 600))
    assert few is not None
    assert many is not None
    assert few.spearman < many.spearman  # type: ignore[operator]
    assert few.overlap[4] < many.overlap[4]


def test_a_ranker_without_examples_has_no_stability() -> None:
    assert stability(rank("depth", Evidence(MODULES, 0)), MODULES, (4,), seed=1) is None
