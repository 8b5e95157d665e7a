"""Room: how many model actors each node of a cluster can hold, by what a recipe asks for. Nodes are as `ray.nodes()` tells them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transplant_ray.recipe import Place, ResourceSpec

Node = Mapping[str, Any]
ACCELERATOR = "accelerator_type:"
"""Begins the name of the resource by which Ray says what kind of GPU a node has."""
SHARE = 0.001
"""Of that resource, what an actor that asks for the kind is given: so many may be on a node."""
Refused = Mapping[str, int]
"""By node, how many places there turned out to be of no use."""
NOBODY: Refused = MappingProxyType({})


def fits(node: Node, resources: ResourceSpec, place: Place) -> int:
    """How many such actors the node holds when it is empty; none where it is dead or not of the kind that is asked for."""
    has = node["Resources"]
    labels = node.get("Labels", {})
    wanted = resources.labels.get(place, {})
    if not node["Alive"] or any(labels.get(name) != value for name, value in wanted.items()):
        return 0
    if resources.accelerator_type is not None and f"{ACCELERATOR}{resources.accelerator_type}" not in has:
        return 0
    by_cpu = int(has.get("CPU", 0) / resources.cpus_per_model)
    if resources.gpus_per_model == 0:
        return by_cpu
    gpus = has.get("GPU", 0)
    if resources.gpus_per_model < 1:  # a fraction never spans two GPUs
        return min(by_cpu, int(gpus) * int(1 / resources.gpus_per_model))
    return min(by_cpu, int(gpus / resources.gpus_per_model))


def room(nodes: Sequence[Node], resources: ResourceSpec, place: Place, refused: Refused = NOBODY) -> int:
    """How many such actors the cluster holds when it is empty, without the places that were of no use."""
    return sum(max(0, fits(node, resources, place) - refused.get(node["NodeID"], 0)) for node in nodes)


def useless(nodes: Sequence[Node], resources: ResourceSpec, place: Place, refused: Refused) -> list[str]:
    """Nodes with no place left that is of any use."""
    return [node["NodeID"] for node in nodes if node["NodeID"] in refused and not room([node], resources, place, refused)]


def demand(resources: ResourceSpec) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """What an autoscaler is asked for, as bundles and the labels of each: room for evaluators, and for source and target at once.

    The stages own it in turn, so what a model is asked for may be an evaluator's, where their labels are the same.
    """
    shape = {"CPU": resources.cpus_per_model, "GPU": resources.gpus_per_model}
    if resources.accelerator_type is not None:
        shape[f"{ACCELERATOR}{resources.accelerator_type}"] = SHARE
    evaluators = 1 if resources.evaluators == "auto" else resources.evaluators
    stages: list[list[Place]] = [["evaluator"] * evaluators, ["source", "target"]]
    wanted: Counter[tuple[tuple[str, str], ...]] = Counter()
    for stage in stages:
        wanted |= Counter(tuple(sorted(resources.labels.get(place, {}).items())) for place in stage)
    labels = [dict(each) for each in wanted.elements()]
    return [{name: amount for name, amount in shape.items() if amount} for _ in labels], labels


def both_at_once(nodes: Sequence[Node], resources: ResourceSpec) -> bool:
    """Whether a source and a target find room beside each other."""
    for source in nodes:
        for target in nodes:
            shared = source["NodeID"] == target["NodeID"]
            if fits(source, resources, "source") and fits(target, resources, "target") > shared:
                return True
    return False


def missing(nodes: Sequence[Node], resources: ResourceSpec) -> str | None:
    """What the cluster can never give as it is; None where it has room for all that the recipe asks for."""
    evaluators = 1 if resources.evaluators == "auto" else resources.evaluators
    wanted: dict[Place, int] = {"evaluator": evaluators, "source": 1, "target": 1}
    for place, number in wanted.items():
        have = room(nodes, resources, place)
        if have < number:
            asked = _asked(resources, place, number)
            return f"{asked} do not fit; the cluster's nodes have {_had(nodes)}, which is {have} of them"
    return None


def _asked(resources: ResourceSpec, place: Place, number: int) -> str:
    what = "evaluators" if place == "evaluator" else f"{place} models"
    kind = f" of type {resources.accelerator_type}" if resources.accelerator_type else ""
    labels = "".join(f", on nodes with {name}={value}" for name, value in sorted(resources.labels.get(place, {}).items()))
    return f"{number} {what} with {resources.gpus_per_model:g} GPUs{kind} and {resources.cpus_per_model:g} CPUs each{labels}"


def _had(nodes: Sequence[Node]) -> str:
    return ", ".join(_described(node) for node in nodes if node["Alive"]) or "nothing"


def _described(node: Node) -> str:
    has = node["Resources"]
    kinds = [name.removeprefix(ACCELERATOR) for name in has if name.startswith(ACCELERATOR)]
    labels = [f"{name}={value}" for name, value in sorted(node.get("Labels", {}).items()) if not name.startswith("ray.io/")]
    beside = f" ({', '.join([*kinds, *labels])})" if kinds or labels else ""
    return f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs{beside}"
