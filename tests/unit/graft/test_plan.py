"""The plan is a function of recipe and rankings: top-K sets that nest, controls that are always there, equal variants once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.errors import RecipeError
from transplant_ray.graft.plan import (
    Planned,
    SweepPlan,
    check_orders,
    depth_order,
    num_parameters,
    plan_sweep,
    random_order,
)
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.recipe import SweepSpec

PATHS = {"self_attn.q_proj": "attn", "self_attn.o_proj": "attn", "mlp.up_proj": "ffn", "mlp.down_proj": "ffn"}


def module(layer: int, path: str, bias: bool = False) -> Module:
    role = Role(PATHS[path], path.rpartition(".")[2].removesuffix("_proj"))  # type: ignore[arg-type]
    name = f"model.layers.{layer}.{path}"
    return Module(name, layer, path, role, (4, 6), False, "F32", f"{name}.weight", f"{name}.bias" if bias else None)


@st.composite
def module_lists(draw: st.DrawFn) -> list[Module]:
    """Both kinds somewhere, else any set of modules in any order."""
    extra = draw(st.sets(st.tuples(st.integers(0, 11), st.sampled_from(sorted(PATHS))), max_size=12))
    places = {(0, "self_attn.q_proj"), (1, "mlp.up_proj")} | extra
    return draw(st.permutations([module(layer, path) for layer, path in sorted(places)]))


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Module], dict[str, list[str]], SweepSpec, SweepPlan]:
    modules = draw(module_lists())
    names = [m.name for m in modules]
    orders = {ranker: draw(st.permutations(names)) for ranker in draw(st.sampled_from([("lae",), ("lae", "depth", "random")]))}
    sweep = SweepSpec.model_validate(
        {
            "k": draw(st.lists(st.integers(1, 20), min_size=1, max_size=4, unique=True)),
            "kind": draw(st.lists(st.sampled_from(["attn", "ffn", "all", "up_proj"]), min_size=1, unique=True)),
            "alpha": draw(st.lists(st.sampled_from([1.0, 0.5, 1e-7]), min_size=1, unique=True)),
            "controls": {"random": draw(st.integers(3, 4))},
        }
    )
    return modules, orders, sweep, plan_sweep(modules, orders, sweep)


def of_kind(modules: Sequence[Module], kind: str) -> set[str]:
    return {m.name for m in modules if kind in ("all", PATHS[m.path]) or m.path.endswith(kind)}


@settings(max_examples=40, deadline=None)
@given(plans())
def test_trials_are_the_best_k_of_their_kind_in_the_rankers_order(drawn: Any) -> None:
    modules, orders, sweep, plan = drawn
    expected = []
    for ranker, order in orders.items():
        for kind in sweep.kind:
            chosen = [name for name in order if name in of_kind(modules, kind)]
            for k in sorted({min(k, len(chosen)) for k in sweep.k}):
                expected += [(ranker, kind, k, alpha, dict.fromkeys(chosen[:k], alpha)) for alpha in sweep.alpha]
    assert [(t.ranker, t.kind, t.k, t.alpha, dict(t.variant.coefficients)) for t in plan.trials] == expected


@settings(max_examples=20, deadline=None)
@given(plans())
def test_top_k_sets_of_one_order_nest(drawn: Any) -> None:
    _, _, _, plan = drawn
    grown: dict[Any, set[str]] = {}
    for entry in plan.entries:
        if entry.role == "trial" or entry.ranker in ("depth", "random"):
            line = (entry.role, entry.ranker, entry.kind, entry.alpha, entry.seed)
            now = set(entry.variant.coefficients)
            assert grown.get(line, set()) < now
            assert len(now) == entry.k
            grown[line] = now


@settings(max_examples=20, deadline=None)
@given(plans())
def test_equal_variants_are_there_once(drawn: Any) -> None:
    _, _, _, plan = drawn
    points = [dict(entry.variant.coefficients) for entry in plan.entries if entry.role != "source"]
    distinct = [point for index, point in enumerate(points) if point not in points[:index]]
    assert [dict(variant.coefficients) for variant in plan.variants] == distinct


@settings(max_examples=20, deadline=None)
@given(plans())
def test_baselines_lead_and_controls_are_always_there(drawn: Any) -> None:
    modules, _, sweep, plan = drawn
    names = {m.name for m in modules}
    assert [entry.role for entry in plan.entries[:3]] == ["target", "source", "all"]
    assert plan.entries[0].variant == ORIGIN
    assert set(plan.entries[2].variant.coefficients) == names
    controls = [entry for entry in plan.entries if entry.role == "control"]
    for kind in sweep.kind:
        seeds = {entry.seed for entry in controls if entry.ranker == "random" and entry.kind == kind}
        assert seeds == set(range(sweep.controls.random))
        assert [entry.k for entry in controls if entry.ranker == "depth" and entry.kind == kind]
    merges = [entry for entry in controls if entry.ranker == "uniform"]
    assert [entry.alpha for entry in merges] == [0.25, 0.5, 0.75]
    assert all(dict(entry.variant.coefficients) == dict.fromkeys(names, entry.alpha) for entry in merges)
    assert [entry for entry in plan.entries if entry.role == "trial"] == list(plan.trials)


@settings(max_examples=20, deadline=None)
@given(plans())
def test_labels_and_ids_find_their_entries(drawn: Any) -> None:
    _, _, _, plan = drawn
    labels = [entry.label for entry in plan.trials]
    assert len(set(labels)) == len(labels)
    assert [plan.trial(label) for label in labels] == list(plan.trials)
    points = [(entry.role, entry.label) for entry in plan.entries]
    assert len(set(points)) == len(points)  # the ranker `depth` has trials of the labels that controls have


@settings(max_examples=20, deadline=None)
@given(plans(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_modules(drawn: Any, rng: random.Random) -> None:
    modules, orders, sweep, plan = drawn
    shuffled = rng.sample(modules, len(modules))
    assert plan_sweep(shuffled, orders, sweep) == plan


@settings(max_examples=20, deadline=None)
@given(module_lists(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_depth_and_random_orders_are_functions_of_the_set(modules: list[Module], seed: int, rng: random.Random) -> None:
    shuffled = rng.sample(modules, len(modules))
    assert depth_order(shuffled) == depth_order(modules)
    assert random_order(shuffled, seed) == random_order(modules, seed)
    assert sorted(random_order(modules, seed)) == sorted(depth_order(modules)) == sorted(m.name for m in modules)
    layers = {m.name: m.layer for m in modules}
    assert [layers[name] for name in depth_order(modules)] == sorted(layers.values())  # 2 before 10, not as text


MODULES = [module(layer, path) for layer in range(3) for path in PATHS]


def planned(**sweep: Any) -> SweepPlan:
    return plan_sweep(MODULES, {"lae": depth_order(MODULES)}, SweepSpec.model_validate({"k": [1], **sweep}))


def test_random_orders_differ_between_seeds() -> None:
    assert len({tuple(random_order(MODULES, seed)) for seed in range(5)}) == 5


def test_a_k_that_is_too_large_is_clipped_and_said() -> None:
    plan = planned(k=[2, 6, 7, 99], kind=["attn", "all"])
    assert [(t.kind, t.k) for t in plan.trials] == [("attn", 2), ("attn", 6), ("all", 2), ("all", 6), ("all", 7), ("all", 12)]
    assert plan.notes == (
        "kind attn: 6 compatible modules; K 7, 99 clipped to 6",
        "kind all: 12 compatible modules; K 99 clipped to 12",
    )
    assert planned(k=[1, 6], kind=["attn"]).notes == ()


def test_a_kind_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match=r"`sweep.kind`: 'down_prj' matches no compatible module. Nearest: down_proj"):
        planned(kind=["down_prj"])


def test_a_trial_equal_to_all_swapped_is_evaluated_once() -> None:
    plan = planned(k=[12])
    assert plan.trials[0].id == plan.entries[2].id
    assert sum(variant.id == plan.trials[0].id for variant in plan.variants) == 1


def test_alphas_that_nearly_agree_keep_labels_of_their_own() -> None:
    labels = [entry.label for entry in planned(alpha=[0.3, 0.30000001, 0.1 + 0.2, 1.0]).trials]
    assert len(set(labels)) == 4


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        (Planned("target", ORIGIN), "target"),
        (Planned("source", ORIGIN), "source"),
        (Planned("all", ORIGIN), "all swapped"),
        (Planned("trial", ORIGIN, "lae", "ffn", 8, 1.0), "lae ffn k=8"),
        (Planned("trial", ORIGIN, "lae", "ffn", 8, 0.5), "lae ffn k=8 alpha=0.5"),
        (Planned("control", ORIGIN, "random", "all", 4, 1.0, 0), "random all k=4 seed=0"),
        (Planned("control", ORIGIN, "uniform", "all", 12, 0.25), "uniform all k=12 alpha=0.25"),
    ],
)
def test_labels_are_for_people(entry: Planned, label: str) -> None:
    assert entry.label == label


@pytest.mark.parametrize(("coefficient", "changed"), [(1.0, 28), (0.5, 28), ((1.0, 0.0, 0.5, 0.0), 14), ((1.0, 0.0, 0.0, 0.0), 7)])
def test_parameters_are_counted_with_their_bias_and_by_channel(coefficient: Coefficient, changed: int) -> None:
    modules = {m.name: m for m in (module(0, "mlp.up_proj", bias=True), module(0, "mlp.down_proj"))}  # 4 × 6 + 4, 4 × 6
    up, down = modules
    assert num_parameters(Variant({up: coefficient}), modules) == changed
    assert num_parameters(Variant({up: coefficient, down: 1.0}), modules) == changed + 24
    assert num_parameters(ORIGIN, modules) == 0


def test_an_order_must_name_every_module_once() -> None:
    names = depth_order(MODULES)
    check_orders({"lae": names, "random": random_order(MODULES, 0)}, MODULES)
    for broken in (names[1:], [*names, "model.layers.9.mlp.up_proj"], [*names, names[0]], [names[1], *names[1:]]):
        with pytest.raises(RecipeError, match=rf"ranking lae: {len(broken)} modules, expected the 12 compatible ones"):
            check_orders({"lae": broken}, MODULES)


@settings(max_examples=20, deadline=None)
@given(plans(), st.integers(19, 25))
def test_an_arm_is_a_random_set_for_every_trial(drawn: Any, num_arms: int) -> None:
    modules, orders, sweep, plan = drawn
    assert plan.arms == ()
    armed = plan_sweep(modules, orders, sweep.model_copy(update={"arms": num_arms}))
    assert armed.entries == plan.entries
    assert len(armed.arms) == num_arms
    for arm in armed.arms:
        assert [(e.kind, e.k, e.alpha) for e in arm] == [(t.kind, t.k, t.alpha) for t in plan.trials]
        for entry in arm:
            assert set(entry.variant.coefficients) <= of_kind(modules, str(entry.kind))
            assert list(entry.variant.coefficients.values()) == [entry.alpha] * (entry.k or 0)
    assert armed == plan_sweep(random.Random(1).sample(modules, len(modules)), orders, sweep.model_copy(update={"arms": num_arms}))


def test_what_a_search_found_has_random_sets_of_its_own_size() -> None:
    modules = [module(layer, path) for layer in range(4) for path in PATHS]
    names = [m.name for m in modules]
    rows = {m.name: (1.0,) + (0.0,) * (m.num_channels - 1) for m in modules[:3]}
    found = [
        Planned("trial", Variant(rows), "gates row", "all", None, 1.0, penalty=0.1),
        Planned("trial", Variant.uniform([n for n in names if "mlp" in n][:2]), "greedy", "ffn", None, 1.0, penalty=0.1),
    ]
    sweep = SweepSpec.model_validate({"k": [2], "kind": ["attn"], "controls": {"random": 4}})
    plan = plan_sweep(modules, {"lae": names}, sweep, found=found)
    sets = [entry for entry in plan.entries if entry.ranker == "random" and entry.penalty is not None]
    assert len({entry.label for entry in sets}) == len(sets) == 8
    assert len({entry.variant for entry in sets}) > 4
    for entry, trial in zip(sets, [found[0]] * 4 + [found[1]] * 4, strict=True):
        assert (entry.role, entry.kind, entry.size) == ("control", trial.kind, pytest.approx(trial.size))
        assert set(entry.variant.coefficients) <= of_kind(modules, str(entry.kind))
    labels = [entry.label for entry in plan.entries]
    assert len(set(labels)) == len(labels)


def test_arms_are_not_each_other() -> None:
    modules = [module(layer, path) for layer in range(8) for path in PATHS]
    names = [m.name for m in modules]
    plan = plan_sweep(modules, {"lae": names, "depth": names}, SweepSpec.model_validate({"k": [5, 9], "arms": 30}))
    sets = [frozenset(entry.variant.coefficients) for arm in plan.arms for entry in arm]
    assert len(set(sets)) == len(sets) == 30 * 4
    counts = [sum(name in chosen for chosen in sets) for name in names]
    assert min(counts) > 0  # drawn from all modules; expected 26 each


def test_a_primary_trial_needs_plain_random_sets_of_its_own_size() -> None:
    modules = [module(layer, path) for layer in range(4) for path in PATHS]
    names = [m.name for m in modules]
    sweep = SweepSpec.model_validate({"k": [2, 99], "kind": ["all", "ffn"], "primary": {"by": "lae", "kind": "ffn", "k": 99}})
    plan = plan_sweep(modules, {"depth": names, "lae": names[::-1]}, sweep)
    assert plan.primary == "lae ffn k=8"
    assert plan.trial(plan.primary).ranker == "lae"
    assert [(len(arm), arm[0].kind, arm[0].k) for arm in plan.arms] == [(1, "ffn", 8)] * 19
