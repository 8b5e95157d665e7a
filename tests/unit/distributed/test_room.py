"""Who fits where: by CPUs, GPUs, kind of GPU and labels; and what a cluster lacks is said in the words of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from transplant_ray.distributed.room import both_at_once, fits, missing, room
from transplant_ray.recipe import ResourceSpec


def node(name: str, cpus: float = 8, gpus: float = 0, kind: str | None = None, labels: Mapping[str, str] | None = None) -> Any:
    has = {"CPU": cpus, "GPU": gpus} | ({f"accelerator_type:{kind}": 1.0} if kind else {})
    return {"NodeID": name, "Alive": True, "Resources": has, "Labels": dict(labels or {})}


def spec(**settings: Any) -> ResourceSpec:
    return ResourceSpec.model_validate(settings)


@given(cpus=st.integers(0, 16), gpus=st.integers(0, 8), share=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, 2.0, 3.0]))
def test_what_fits_is_what_can_be_packed(cpus: int, gpus: int, share: float) -> None:
    """By hand: actors one after another, each on the first GPUs that are free enough."""
    free, packed = [1.0] * gpus, 0
    while packed < cpus:
        if share and share < 1:
            places = [i for i, left in enumerate(free) if left >= share - 1e-9]
            if not places:
                break
            free[places[0]] -= share
        elif share:
            places = [i for i, left in enumerate(free) if left == 1.0]
            if len(places) < share:
                break
            for place in places[: int(share)]:
                free[place] = 0.0
        packed += 1
    assert fits(node("a", cpus, gpus), spec(gpus_per_model=share), "evaluator") == packed


def test_the_dead_hold_nothing() -> None:
    assert fits({**node("a"), "Alive": False}, spec(), "evaluator") == 0


def test_labels_and_kinds_of_gpu_choose_the_nodes() -> None:
    nodes = [node("a", gpus=4, kind="H100", labels={"role": "source"}), node("b", gpus=2, kind="L4", labels={"role": "target"})]
    by_label = spec(gpus_per_model=1, labels={"source": {"role": "source"}, "target": {"role": "target"}})
    assert [room(nodes, by_label, place) for place in ("source", "target", "evaluator")] == [4, 2, 6]
    assert room(nodes, spec(gpus_per_model=1, accelerator_type="L4"), "evaluator") == 2
    assert missing(nodes, by_label) is None
    lacking = missing(nodes, spec(gpus_per_model=1, labels={"source": {"role": "sauce"}}))
    assert lacking is not None
    assert "1 source models with 1 GPUs and 1 CPUs each, on nodes with role=sauce do not fit" in lacking
    assert "4 GPUs and 8 CPUs (H100, role=source)" in lacking
    of_a_kind = missing(nodes, spec(gpus_per_model=1, accelerator_type="A100"))
    assert of_a_kind is not None
    assert "1 evaluators with 1 GPUs of type A100" in of_a_kind


def test_both_models_at_once_need_a_place_each() -> None:
    one, two = [node("a", gpus=1)], [node("a", gpus=2)]
    apart = [node("a", gpus=1, labels={"role": "x"}), node("b", gpus=1)]
    whole = spec(gpus_per_model=1)
    assert [both_at_once(nodes, whole) for nodes in (one, two, apart)] == [False, True, True]
    on_one = spec(gpus_per_model=1, labels={"source": {"role": "x"}, "target": {"role": "x"}})
    assert not both_at_once(apart, on_one)


def test_auto_needs_room_for_one() -> None:
    assert missing([node("a", gpus=1)], spec(gpus_per_model=1, evaluators="auto")) is None
    assert missing([node("a")], spec(gpus_per_model=1, evaluators="auto")) is not None
    assert missing([node("a", gpus=1)], spec(gpus_per_model=1, evaluators=2)) is not None


NONSENSE: list[dict[str, Any]] = [
    {"evaluators": 0},
    {"evaluators": "many"},
    {"accelerator_type": "H100"},
    {"labels": {"trial": {}}},
    {"wait": -1},
]


@pytest.mark.parametrize("settings", NONSENSE)
def test_what_has_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**settings)
