"""The cluster: start or join it, know what it has, and refuse what it can never give."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transplant_ray.distributed.packing import refuse_relative, refuse_relative_database, refuse_relative_outputs
from transplant_ray.distributed.room import NOBODY, Refused, both_at_once, demand, fits, missing, room, useless
from transplant_ray.errors import ResourceError, TransplantError
from transplant_ray.recipe import AnyRecipe, Place, ResourceSpec, TrackingSpec

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process of a submitted job."""
NODE_LABEL = "ray.io/node-id"
"""Of every node, by Ray."""
LOCAL = "local"
"""As an address: a Ray of our own. Without any, Ray would join whatever somebody has started on this machine."""
REACH_SECONDS = 10
RETRIES = 9
"""So often a call is tried again whose actor has died over it: without end, nobody would hear of a model that is larger than the
memory. Ray waits twice as long each time, from .1 seconds: 51 in all, for a node that dies is known as dead after 15 (of five tries
the last was over after 8). From then on, waiting for a place is no try."""
POLL_SECONDS = 2.0
"""How often it is asked whether a node has come or gone."""


GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,  # what it gave was still on its node, which died: what is large stays there till it is read
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,  # where Ray itself ended it, to save its node
    ray.exceptions.WorkerCrashedError,
)
"""How Ray says that an actor has died, or that what it gave was lost with it: asked again, it comes."""


@contextmanager
def deaths_told() -> Iterator[None]:
    """ResourceError where an actor has died more often in the block than its calls are tried again."""
    try:
        yield
    except GONE as error:
        raise ResourceError(
            "a process that holds a model died again and again, while it loaded or at work; memory may have run out. Give it a "
            "machine with more of it (`resources`), or a smaller `dtype`. The same command goes on where this one stopped."
        ) from error


@dataclass(frozen=True)
class Capacity:
    """Where model actors go, and for how many of them there is room."""

    resources: ResourceSpec

    def start(self, actor_class: Any, place: Place, *args: Any, refused: Refused = NOBODY) -> ActorHandle:
        """A model actor; it waits where the cluster is full."""
        return actor_class.options(**self.options(place, refused)).remote(*args)

    def options(self, place: Place, refused: Refused = NOBODY) -> dict[str, Any]:
        """Ray options of a model actor: it restarts when it dies, and calls to it are tried again, `RETRIES` times.

        It goes to no node where others found no place of use.
        """
        resources = self.resources
        labels = dict(resources.labels.get(place, {}))
        if avoided := useless(ray.nodes(), resources, place, refused) if refused else []:
            labels.setdefault(NODE_LABEL, f"!in({','.join(sorted(avoided))})")
        placed: dict[str, Any] = {"label_selector": labels} if labels else {}
        if resources.accelerator_type is not None:
            placed["accelerator_type"] = resources.accelerator_type
        num = {"num_cpus": resources.cpus_per_model, "num_gpus": resources.gpus_per_model}
        return {**num, **placed, "max_restarts": -1, "max_task_retries": RETRIES}

    @property
    def holds_both(self) -> bool:
        """Whether source and target can be there at once."""
        return both_at_once(ray.nodes(), self.resources)

    @property
    def num_elsewhere(self) -> int:
        """Nodes where a model actor may be that are not the driver's own, which may have no room for any."""
        here = ray.get_runtime_context().get_node_id()
        return sum(fits(node, self.resources, "evaluator") > 0 for node in ray.nodes() if node["NodeID"] != here)

    @property
    def grows(self) -> bool:
        """Whether more evaluators are of use than there is room for now, for somebody may make room."""
        return self.resources.evaluators == "auto" and self.resources.wait > 0

    def evaluators(self, refused: Refused = NOBODY) -> int:
        """How many there should be now; none where every place was refused."""
        wanted = self.resources.evaluators
        if wanted != "auto" and not refused:
            return wanted
        found = room(ray.nodes(), self.resources, "evaluator", refused)
        return found if wanted == "auto" else min(wanted, found)


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """For an actor on the driver's own node, which dies with it alone, and has seen all files."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def connect(resources: ResourceSpec) -> Iterator[Capacity]:
    """A cluster for the block: the one this process has joined, the one at `address` or RAY_ADDRESS, or a local one.

    ResourceError where the cluster cannot be reached, or can never hold what the recipe asks for.
    """
    mine = not ray.is_initialized()
    if mine:
        _start(resources.address)
    try:
        wait_for_room(resources)
        yield Capacity(resources)
    finally:
        if mine:
            ray.shutdown()


def wait_for_room(resources: ResourceSpec) -> None:
    """Ask a cluster that grows for what is missing, for `resources.wait` seconds. ResourceError where it is not there then."""
    end = time.monotonic() + resources.wait
    asked = False
    try:
        while (lacking := missing(ray.nodes(), resources)) is not None:
            if time.monotonic() >= end:
                waited = f" after {resources.wait:g} seconds" if resources.wait else ""
                raise ResourceError(
                    f"`resources`: {lacking}{waited}. Lower `evaluators`, `gpus_per_model` or `cpus_per_model`, join a larger "
                    "cluster with `address`, or give one that grows by itself some seconds to `wait`."
                )
            asked = _ask_to_grow(resources)  # each time: another driver that asks, or needs no more, overrides what was asked
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
    finally:
        if asked:
            request_resources(bundles=[])  # else the cluster would stay as large for ever


def _ask_to_grow(resources: ResourceSpec) -> bool:
    bundles, labels = demand(resources)
    request_resources(bundles=bundles, bundle_label_selectors=labels)
    return True


def refuse_vanishing_paths(recipe: AnyRecipe) -> None:
    """Inside a submitted job a relative path is in Ray's own session folder, and lost to whoever submitted it."""
    if JOB_CONFIG in os.environ:
        refuse_relative_outputs(recipe)


def refuse_vanishing_organ(out: str | Path, tracking: TrackingSpec | None) -> None:
    """The same of a training, which has no recipe."""
    if JOB_CONFIG in os.environ:
        refuse_relative("out", str(out))
        refuse_relative_database("tracking", "" if tracking is None else tracking.uri)


def _start(address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs leave CUDA_VISIBLE_DEVICES alone
    place = address or os.environ.get("RAY_ADDRESS") or LOCAL
    try:
        if place == LOCAL:
            with _on_loopback():
                ray.init(address=LOCAL, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        else:
            _reach(place)
            ray.init(address=place, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a local node that does not come up within 30 seconds is a bare Exception of Ray
        if place != LOCAL:
            message = f"`resources.address`: no Ray cluster at {place!r} ({error}). Start one with `ray start --head`."
        else:
            message = f"Ray did not start on this machine ({error}). Is it very busy? Try again, or join a cluster with `address`."
        raise ResourceError(message) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes that start in the block listen on 127.0.0.1 alone.

    Whatever address it is told, Ray takes one that other machines reach, and listens on all; unless it holds the machine for one
    of those on which it supports no clusters. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 says the same, and is read only at import.
    """
    known = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known


def _reach(address: str) -> None:
    """Ask briefly before Ray does: for a head that is not there it waits minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Our own errors as they were raised in an actor, without Ray's traceback around them. ResourceError where an actor is gone."""
    try:
        yield
    except ray.exceptions.RuntimeEnvSetupError as error:
        reason = " ".join(str(error).split())[:500]
        raise ResourceError(f"a runtime environment could not be set up on a node ({reason}).") from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # raised in an actor that a task called
            cause = cause.cause
        if isinstance(cause, TransplantError):
            raise type(cause)(str(cause)) from None
        if isinstance(cause, GONE):
            raise _gone_for_good(cause) from error
        raise
    except GONE as error:
        raise _gone_for_good(error) from error


def _gone_for_good(error: BaseException) -> ResourceError:
    reason = " ".join(str(error).split())[:500]
    return ResourceError(f"an actor is gone for good ({reason}). The same command goes on where it stopped.")
