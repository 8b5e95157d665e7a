"""Lazy greedy against plain greedy: the same where gains only shrink or all are tried, and never stopped too early."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import draw_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, save_tiny, tiny_pair, tiny_tokenizer
from torch.nn.functional import cross_entropy

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.catalogue import select_kind
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.loading import load_model
from transplant_ray.probe.greedy import LEAST_GAIN, greedy, lazy_order
from transplant_ray.probe.resident_rankers import Bench
from transplant_ray.probe.search import Search
from transplant_ray.recipe import GreedySpec

Value = Callable[[frozenset[str]], float]
NAMES = [f"m{i}" for i in range(9)]


def plain_order(names: Sequence[str], value: Value, most: int) -> list[str]:
    """Every name that is left, at every step."""
    chosen: list[str] = []
    while len(chosen) < min(most, len(names)):
        left = [name for name in names if name not in chosen]
        best = min(left, key=lambda name: value(frozenset([*chosen, name])))
        if value(frozenset(chosen)) - value(frozenset([*chosen, best])) < LEAST_GAIN:
            break
        chosen.append(best)
    return chosen


def counted(value: Value) -> tuple[Callable[[Sequence[tuple[str, ...]]], list[float]], list[frozenset[str]]]:
    asked: list[frozenset[str]] = []

    def objective(sets: Sequence[tuple[str, ...]]) -> list[float]:
        asked.extend(map(frozenset, sets))
        return [value(frozenset(chosen)) for chosen in sets]

    return objective, asked


def coverage(seed: int) -> Value:
    """Weight that is not covered yet, and a cost for every module: gains only shrink."""
    rng = random.Random(seed)
    covers = {name: set(rng.sample(range(12), rng.randint(0, 6))) for name in NAMES}
    weights, costs = [rng.randint(1, 64) / 8 for _ in range(12)], {name: rng.randint(0, 32) / 16 for name in NAMES}
    return lambda chosen: (
        sum(weights) - sum(weights[i] for i in set().union(*(covers[n] for n in chosen))) + sum(costs[n] for n in chosen)
    )


def anything(seed: int) -> Value:
    return lambda chosen: random.Random(f"{seed} {sorted(chosen)}").random()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9))
def test_where_gains_only_shrink_it_is_plain_greedy(seed: int, width: int, most: int) -> None:
    value = coverage(seed)
    objective, _ = counted(value)
    found, expected = lazy_order(NAMES, objective, most, width), plain_order(NAMES, value, most)
    # Equal gains may come in another order; what is reached is the same, step by step, as long as nothing tied.
    gains = [value(frozenset(expected[:i])) - value(frozenset([*expected[:i], n])) for i in range(len(expected)) for n in NAMES]
    if len(set(gains)) == len(gains):
        assert found == expected
    else:
        assert [value(frozenset(found[:1])), len(found) > 0] == [value(frozenset(expected[:1])), len(expected) > 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_where_all_are_tried_it_is_plain_greedy_whatever_the_objective(seed: int, most: int) -> None:
    value = anything(seed)
    assert lazy_order(NAMES, counted(value)[0], most, len(NAMES)) == plain_order(NAMES, value, most)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_it_falls_at_every_step_and_stops_where_nothing_lowers_it(seed: int, width: int) -> None:
    value = anything(seed)
    order = lazy_order(NAMES, counted(value)[0], len(NAMES), width)
    path = [value(frozenset(order[:k])) for k in range(len(order) + 1)]
    assert path == sorted(path, reverse=True)
    assert len(set(order)) == len(order)
    assert all(value(frozenset([*order, name])) > path[-1] - LEAST_GAIN for name in NAMES)


def test_fewer_sets_are_tried_than_by_plain_greedy() -> None:
    names = [f"m{i}" for i in range(64)]
    worth = {name: 2.0 ** -(place % 32) for place, name in enumerate(names)}
    objective, asked = counted(lambda chosen: -sum(worth[name] for name in chosen))
    order = lazy_order(names, objective, 20, 4)
    assert order == sorted(names, key=lambda name: -worth[name])[:20]
    assert len(asked) == len(set(asked))
    assert len(asked) <= 1 + 64 + 19 * 4 < 20 * 64 / 4


# On models.


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def search(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Search:
    return make_search(tiny_pair(tmp_path_factory.mktemp(request.param), request.param))


def make_search(comparison: Comparison) -> Search:
    engine = Engine(load_resident_pair(comparison, "float64"), tiny_tokenizer(), GenerationSettings(4, (EOS,)), "exact")
    rng = random.Random(1)
    task, guard = draw_examples(rng, 5, 8), draw_examples(rng, 4, 8)
    return Search(Bench(engine, lambda: load_model(comparison.source, "float64"), task, 4), {"guard": guard})


def slow_value(search: Search, penalty: float) -> Value:
    """One variant by pointer, one example at a time."""
    pair = search.bench.engine.pair
    known: dict[frozenset[str], float] = {}

    @torch.inference_mode()
    def value(chosen: frozenset[str]) -> float:
        if chosen not in known:
            parts = []
            with pair.grafted(Variant.uniform(chosen)) as model:
                for examples in (search.bench.examples, *search.guards.values()):
                    each = []
                    for example in examples:
                        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
                        logits_SV = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(example.prompt_ids) - 1 :]
                        each.append(float(cross_entropy(logits_SV, torch.tensor(example.answer_ids))))
                    parts.append(sum(each) / len(each))
            known[chosen] = parts[0] + penalty * parts[1]
        return known[chosen]

    return value


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_of_few_modules_it_takes_those_of_plain_greedy(search: Search, penalty: float) -> None:
    names = [module.name for module in select_kind(search.bench.engine.pair.modules.values(), "ffn")]
    (found,) = greedy(search, GreedySpec(kind="ffn", penalty=(penalty,)))
    expected = plain_order(names, slow_value(search, penalty), len(names))
    assert list(found.order) == expected
    assert found.variant == Variant.uniform(expected)
    assert found.num_coefficients == len(names)
    value = slow_value(search, penalty)(frozenset(expected))
    assert found.task_loss + penalty * found.guard_loss == pytest.approx(value, rel=1e-4)
    assert (found.task_loss_before_rounding, found.guard_loss_before_rounding) == (found.task_loss, found.guard_loss)


def test_of_all_modules_it_ends_where_none_lowers_the_objective(search: Search) -> None:
    first, second = greedy(search, GreedySpec(penalty=(0.0, 1.5)))
    for found in (first, second):
        value = slow_value(search, found.penalty)
        path = [value(frozenset(found.order[:k])) for k in range(len(found.order) + 1)]
        assert path == sorted(path, reverse=True)
        left = [name for name in search.bench.names if name not in found.order]
        assert min((value(frozenset([*found.order, name])) for name in left), default=inf) > path[-1] - 1e-4
    (alone,) = greedy(search, GreedySpec(penalty=(1.5,)))
    assert alone.order == second.order
    assert 0 < second.cost.forwards < alone.cost.forwards  # what the first measured is not measured again
    assert alone.cost.backwards == 0


def test_k_bounds_the_path_and_the_path_is_the_beginning_of_the_longer_one(search: Search) -> None:
    (short,), (long,) = (greedy(search, GreedySpec(penalty=(0.0,), kind="attn", k=k)) for k in (2, None))
    assert short.order == long.order[:2]


def test_equal_models_stay_as_they_are(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", seed=2)
    (found,) = greedy(make_search(compare(open_checkpoint(str(folder)), open_checkpoint(str(folder)))), GreedySpec(penalty=(1.0,)))
    assert (found.variant, found.order) == (ORIGIN, ())


def test_what_has_no_effect_is_refused(search: Search) -> None:
    with pytest.raises(RecipeError, match=r"`search\.greedy\.kind`: 'fnn' matches"):
        greedy(search, GreedySpec(kind="fnn"))
    with pytest.raises(RecipeError, match=r"`search\.greedy\.penalty`: 3 has no effect"):
        greedy(replace(search, guards={}), GreedySpec())
