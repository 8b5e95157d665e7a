"""What Ray is told of where actors may go, and what an autoscaler is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from transplant_ray.distributed import cluster
from transplant_ray.distributed.cluster import RETRIES, Capacity, wait_for_room
from transplant_ray.distributed.room import demand
from transplant_ray.errors import ResourceError
from transplant_ray.recipe import ResourceSpec

NODES = [
    {"NodeID": name, "Alive": True, "Resources": {"CPU": 8, "GPU": gpus}, "Labels": {"role": "x"}}
    for name, gpus in (("a", 1), ("b", 2))
]


def capacity(**settings: Any) -> Capacity:
    return Capacity(ResourceSpec.model_validate({"gpus_per_model": 1, **settings}))


@pytest.fixture(autouse=True)
def _nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: NODES)


def test_labels_and_the_kind_of_gpu_reach_ray() -> None:
    asked = capacity(labels={"source": {"role": "source"}}, accelerator_type="H100", cpus_per_model=2)
    assert asked.options("source") == {
        "num_cpus": 2, "num_gpus": 1, "label_selector": {"role": "source"}, "accelerator_type": "H100",
        "max_restarts": -1, "max_task_retries": RETRIES,
    }  # fmt: skip
    assert "label_selector" not in asked.options("target")
    assert "accelerator_type" not in capacity().options("target")


def test_a_node_with_no_place_of_use_left_is_kept_away_from() -> None:
    asked = capacity(labels={"evaluator": {"role": "x"}})
    assert asked.options("evaluator", {"b": 1})["label_selector"] == {"role": "x"}, "it has another"
    assert capacity().options("evaluator", {"b": 2, "a": 1})["label_selector"] == {"ray.io/node-id": "!in(a,b)"}
    assert capacity().options("evaluator", {"gone": 1}) == capacity().options("evaluator")


def test_places_of_no_use_do_not_count() -> None:
    auto, two = capacity(evaluators="auto"), capacity(evaluators=2)
    assert [auto.evaluators(), auto.evaluators({"b": 1}), auto.evaluators({"a": 1, "b": 2})] == [3, 2, 0]
    assert [two.evaluators(), two.evaluators({"a": 1}), two.evaluators({"b": 10})] == [2, 2, 1]
    assert capacity(evaluators=5).evaluators() == 5, "those that do not fit yet wait"
    assert [auto.grows, capacity(evaluators="auto", wait=9).grows, capacity(wait=9).grows] == [False, True, False]


def test_an_autoscaler_is_asked_for_the_largest_stage_with_labels_and_kind_of_gpu() -> None:
    bundle = {"CPU": 1, "GPU": 1}
    assert demand(capacity(evaluators="auto").resources) == ([bundle] * 2, [{}] * 2), "source and target"
    assert demand(capacity(evaluators=3).resources) == ([bundle] * 3, [{}] * 3)
    assert demand(capacity(gpus_per_model=0).resources)[0] == [{"CPU": 1}] * 2
    placed = capacity(evaluators=2, labels={"source": {"role": "s"}, "evaluator": {"role": "e"}}, accelerator_type="L4")
    bundles, labels = demand(placed.resources)
    assert bundles == [bundle | {"accelerator_type:L4": 0.001}] * 4
    assert labels == [{"role": "e"}, {"role": "e"}, {"role": "s"}, {}]


def test_what_is_asked_for_is_taken_back_when_the_wait_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(cluster, "request_resources", lambda **request: asked.append(request))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    with pytest.raises(ResourceError, match=r"4 evaluators with 1 GPUs .* after 0\.05 seconds"):
        wait_for_room(capacity(evaluators=4, labels={"evaluator": {}}, wait=0.05).resources)
    bundles = [{"CPU": 1, "GPU": 1}] * 4
    assert asked.pop() == {"bundles": []}
    assert len(asked) > 1, "again and again: what another driver asks for takes its place"
    assert all(request == {"bundles": bundles, "bundle_label_selectors": [{}] * 4} for request in asked)
