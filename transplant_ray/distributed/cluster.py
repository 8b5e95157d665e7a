"""The cluster: start or join it, know what it has, and refuse what it can never give."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.packing import refuse_relative_outputs
from transplant_ray.errors import ResourceError, TransplantError
from transplant_ray.recipe import Recipe, ResourceSpec

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process of a submitted job."""
REACH_SECONDS = 10


@dataclass(frozen=True)
class Capacity:
    """What one model actor takes, and how many of them each node can hold at once."""

    cpus: float
    gpus: float
    actors_per_node: tuple[int, ...]

    @property
    def num_actors(self) -> int:
        return sum(self.actors_per_node)

    def start(self, actor_class: Any, *args: Any) -> ActorHandle:
        """A model actor; it waits where the cluster is full."""
        return actor_class.options(**self.options()).remote(*args)

    def options(self) -> dict[str, Any]:
        """Ray options of a model actor: it restarts when it dies, and calls to it are tried again until it answers."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": -1, "max_task_retries": -1}


@contextmanager
def connect(resources: ResourceSpec) -> Iterator[Capacity]:
    """A cluster for the block: the one this process has joined, the one at `address` or RAY_ADDRESS, or a local one.

    ResourceError where the cluster cannot be reached, or can never hold what the recipe asks for.
    """
    mine = not ray.is_initialized()
    if mine:
        _start(resources.address)
    try:
        yield capacity(resources)
    finally:
        if mine:
            ray.shutdown()


def capacity(resources: ResourceSpec) -> Capacity:
    """How many model actors fit on the nodes that are alive. ResourceError where it is fewer than `resources.evaluators`."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = tuple(_fit(node, resources) for node in nodes)
    if sum(fits) < resources.evaluators:
        have = ", ".join(f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} CPUs" for node in nodes) or "no nodes"
        raise ResourceError(
            f"`resources`: {resources.evaluators} evaluators with {resources.gpus_per_model:g} GPUs and "
            f"{resources.cpus_per_model:g} CPUs each do not fit; the cluster's nodes have {have}, which is {sum(fits)} of them. "
            "Lower `evaluators`, `gpus_per_model` or `cpus_per_model`, or join a larger cluster with `address`."
        )
    return Capacity(resources.cpus_per_model, resources.gpus_per_model, fits)


def refuse_vanishing_paths(recipe: Recipe) -> None:
    """Inside a submitted job a relative path is in Ray's own session folder, and lost to whoever submitted it."""
    if JOB_CONFIG in os.environ:
        refuse_relative_outputs(recipe)


def _start(address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs leave CUDA_VISIBLE_DEVICES alone
    place = address or os.environ.get("RAY_ADDRESS", "")
    try:
        _reach(place)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if address else False,
        )
    except Exception as error:  # a local node that does not come up within 30 seconds is a bare Exception of Ray
        if place:
            message = f"`resources.address`: no Ray cluster at {place!r} ({error}). Start one with `ray start --head`."
        else:
            message = f"Ray did not start on this machine ({error}). Is it very busy? Try again, or join a cluster with `address`."
        raise ResourceError(message) from error


def _reach(address: str) -> None:
    """Ask briefly before Ray does: for a head that is not there it waits minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


def _fit(node: dict[str, float], resources: ResourceSpec) -> int:
    by_cpu = int(node.get("CPU", 0) / resources.cpus_per_model)
    if resources.gpus_per_model == 0:
        return by_cpu
    gpus = node.get("GPU", 0)
    if resources.gpus_per_model < 1:  # a fraction never spans two GPUs
        return min(by_cpu, int(gpus) * int(1 / resources.gpus_per_model))
    return min(by_cpu, int(gpus / resources.gpus_per_model))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Our own errors as they were raised in an actor, without Ray's traceback around them."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # raised in an actor that a task called
            cause = cause.cause
        if isinstance(cause, TransplantError):
            raise type(cause)(str(cause)) from None
        raise
