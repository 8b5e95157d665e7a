"""Variants by channel: of each of the K modules the best channels, and controls and arms that change as much."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.graft.plan import SweepPlan, depth_order, plan_sweep, random_channels, top_channels
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.recipe import SweepSpec

WIDTHS = {"up_proj": 10, "down_proj": 4}


def module(layer: int, leaf: str) -> Module:
    name = f"model.layers.{layer}.mlp.{leaf}"
    return Module(name, layer, f"mlp.{leaf}", Role("ffn", leaf), (WIDTHS[leaf], 6), False, "F32", f"{name}.weight", None)


MODULES = [module(layer, leaf) for layer in range(6) for leaf in WIDTHS]
SCORES = random_channels(MODULES, 7)


def planned(shares: list[float], arms: int = 0) -> SweepPlan:
    sweep = SweepSpec.model_validate({"k": [1, 4], "channels": shares, "arms": arms})
    orders = {"channel": depth_order(MODULES)[::-1], "lae": depth_order(MODULES)}
    return plan_sweep(MODULES, orders, sweep, {"channel": SCORES})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=1, max_size=40), st.integers(1, 99))
def test_the_best_channels_are_taken(scores: list[float], percent: int) -> None:
    taken = top_channels(scores, percent / 100)
    assert set(taken) <= {0.0, 1.0}
    assert sum(taken) == -(-percent * len(scores) // 100)  # in whole numbers: 10 % of 30 are 3
    inside = [score for score, c in zip(scores, taken, strict=True) if c]
    outside = [score for score, c in zip(scores, taken, strict=True) if not c]
    assert min(inside) >= max(outside, default=min(inside))


def test_a_ranker_with_channel_scores_has_trials_by_channel_and_another_has_none() -> None:
    plan = planned([0.1, 0.5])
    by_channel = [trial for trial in plan.trials if trial.channels is not None]
    assert [(t.ranker, t.k, t.channels) for t in by_channel] == [("channel", k, share) for k in (1, 4) for share in (0.1, 0.5)]
    assert by_channel[-1].label == "channel all k=4 channels=0.5"
    for trial in by_channel:
        assert list(trial.variant.coefficients) == sorted(depth_order(MODULES)[::-1][: trial.k])
        for name, coefficients in trial.variant.coefficients.items():
            assert coefficients == top_channels(SCORES[name], trial.channels or 0)


def test_a_set_by_channel_counts_by_its_share() -> None:
    (trial,) = [t for t in planned([0.5]).trials if t.channels and t.k == 4]
    assert trial.size == 2.0
    assert [t.size for t in planned([0.5]).trials if t.channels is None] == [1.0, 4.0, 1.0, 4.0]


def test_every_seed_has_controls_by_channel() -> None:
    controls = [c for c in planned([0.25]).entries if c.role == "control" and c.channels is not None]
    assert {(c.ranker, c.k, c.seed) for c in controls} == {("random", k, seed) for k in (1, 4) for seed in range(3)}
    assert len({c.variant.id for c in controls}) == len(controls)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_set_of_an_arm_is_as_large_as_its_trial(share: float) -> None:
    plan = planned([share], arms=19)
    for arm in plan.arms:
        assert [point.channels for point in arm] == [trial.channels for trial in plan.trials]
        for point, trial in zip(arm, plan.trials, strict=True):
            assert len(point.variant.coefficients) == len(trial.variant.coefficients)
            for name, coefficients in point.variant.coefficients.items():
                assert isinstance(coefficients, tuple) == (trial.channels is not None)
                if isinstance(coefficients, tuple):
                    width = WIDTHS[name.rpartition(".")[2]]
                    sizes = {ceil(share * w - 1e-9) / w for w in WIDTHS.values()}
                    assert sum(coefficients) in {ceil(size * width - 1e-9) for size in sizes}
    assert len({point.id for arm in plan.arms for point in arm if point.channels}) > 19
