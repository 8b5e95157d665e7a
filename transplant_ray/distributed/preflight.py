"""Preflight: before anything is loaded, every node that may be given work shows that it can do it, in seconds, not hours in.

Where there is no other node than the driver's own, the same is looked at in the driver's process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import get_args
from uuid import uuid4

import ray
import requests
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transplant_ray.distributed.room import Node, fits
from transplant_ray.errors import CheckpointError, OrganError, ResourceError, TransplantError, UnfitNode
from transplant_ray.evaluate.scorers import check_scorer
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.fingerprint import sample
from transplant_ray.models.header import read_header
from transplant_ray.organ.folder import Organ
from transplant_ray.organ.manifest import WEIGHTS, read_manifest
from transplant_ray.recipe import Place, ResourceSpec, TrackingSpec, redact
from transplant_ray.shelf import Shelf
from transplant_ray.versions import DECIDING, public_version, versions

ANSWER_SECONDS = 300
"""A node may have to unpack a runtime environment and to import torch first."""
REACH_SECONDS = 10
COMPARED = (*DECIDING, "ray", "safetensors", "numpy")
HARDWARE = tuple(map(Path, ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
"""Where Linux shows that there are GPUs, whatever torch thinks of them."""
DRIVER = "driver"


@dataclass(frozen=True)
class Needs:
    """What a node must be able to do."""

    checkpoints: Mapping[str, Checkpoint]
    """By their key in the recipe, as the driver sees them."""
    scorers: tuple[str, ...]
    shelf: Shelf
    """Where results go, or what all nodes read of them."""
    tracking: str | None
    """Address of a tracking server; only the driver must reach it."""
    versions: Mapping[str, str]
    """Those of the driver."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """By folder, of the driver's copies of the checkpoints."""
    num_gpus: float = 0
    """That Ray promises on the node, where models run on GPUs."""
    organs: Mapping[str, Organ] = field(default_factory=dict)
    """As `checkpoints`."""


def make_needs(
    checkpoints: Mapping[str, Checkpoint],
    shelf: Shelf,
    tracking: TrackingSpec,
    *,
    scorers: Iterable[str] = (),
    organs: Mapping[str, Organ] | None = None,
    libraries: Iterable[str] = (),
) -> Needs:
    """What every verb needs, and its own: `libraries` are compared beside those that all compare."""
    return Needs(
        checkpoints=checkpoints,
        scorers=tuple(sorted(set(scorers))),
        shelf=shelf,
        tracking=tracking.uri if tracking.uri.startswith(("http://", "https://")) else None,
        versions=versions((*COMPARED, *libraries)),
        samples=samples_of(checkpoints.values()),
        organs=organs or {},
    )


@dataclass(frozen=True)
class Seen:
    """What a node cannot do, and what it should know."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def preflight(needs: Needs, resources: ResourceSpec, note: Callable[[str], None]) -> int:
    """Ask every node that may hold a model; returns how many. ResourceError that names each node and what it cannot do."""
    nodes = [node for node in ray.nodes() if any(fits(node, resources, place) for place in get_args(Place))]
    with _token(needs.shelf) as token:
        if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
            alone = replace(needs, checkpoints={}, organs={}, scorers=(), tracking=None)  # the driver has just looked at these
            seen = {_name(nodes[0]): look(_for_node(alone, nodes[0], resources), token)}
        else:
            seen = _ask(nodes, needs, resources, token)
    for name, found in seen.items():
        for warning in found.warnings:
            note(f"warning: {name}: {warning}")
    failed = [f"{name}: {problem}" for name, found in seen.items() for problem in found.problems]
    if failed:
        raise ResourceError("preflight: nothing was started.\n" + "\n".join(failed))
    return len(seen)


def look(needs: Needs, token: str | None = None) -> Seen:
    """What this process sees of it; `token` names what the driver has left in the storage."""
    checks = [
        *(partial(_see_checkpoint, key, checkpoint, needs.samples) for key, checkpoint in needs.checkpoints.items()),
        *(partial(_see_organ, key, organ) for key, organ in needs.organs.items()),
        *(partial(check_scorer, scorer) for scorer in needs.scorers),
        partial(check_versions, needs.versions),
        *([] if token is None else [partial(_see_storage, needs.shelf, token)]),
    ]
    gpu_problem, gpu_warning = _see_gpus(needs.num_gpus)
    found = [*(_problem(check) for check in checks), gpu_problem]
    warnings = [gpu_warning, None if needs.tracking is None else _see_tracking(needs.tracking)]
    return Seen(tuple(filter(None, found)), tuple(filter(None, warnings)))


def _ask(nodes: Sequence[Node], needs: Needs, resources: ResourceSpec, token: str) -> dict[str, Seen]:
    """By the name of the node. One that dies meanwhile is left to Ray, which tells of its death."""
    asked = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[_look.options(scheduling_strategy=here).remote(_for_node(needs, node, resources), token)] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    seen = {}
    for ref, node in asked.items():
        try:
            seen[_name(node)] = ray.get(ref) if ref in ready else Seen((f"did not answer within {ANSWER_SECONDS} seconds",), ())
        except ray.exceptions.RayError as error:
            if node["NodeID"] in {other["NodeID"] for other in ray.nodes() if other["Alive"]}:
                seen[_name(node)] = Seen((f"could not look ({_reason(error)})",), ())
    return seen


def _reason(error: Exception) -> str:
    """What was raised there, or the end of what Ray says of it."""
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines if cause else lines[-1:])[:300]


@ray.remote(num_cpus=0, max_retries=0)
def _look(needs: Needs, token: str) -> Seen:
    return look(needs, token)


def _for_node(needs: Needs, node: Node, resources: ResourceSpec) -> Needs:
    return replace(needs, num_gpus=node["Resources"].get("GPU", 0) if resources.gpus_per_model else 0)


def _name(node: Node) -> str:
    return f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})"


@contextmanager
def _token(shelf: Shelf) -> Iterator[str]:
    """A folder in the storage with a word of the driver in it, for others to read and to write beside."""
    token = f".preflight-{uuid4().hex}"
    shelf.write(f"{token}/{DRIVER}", token.encode())
    try:
        yield token
    finally:
        with suppress(TransplantError):
            shelf.remove(token)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except TransplantError as error:
        return f"{type(error).__name__}: {error}"
    return None


def samples_of(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """By folder. What the hub gives is known by its commit."""
    folders = {checkpoint.folder for checkpoint in checkpoints if checkpoint.folder is not None and checkpoint.home is None}
    return {str(folder): sample(folder) for folder in folders}


def check_sample(checkpoint: Checkpoint, samples: Mapping[str, str]) -> None:
    """CheckpointError where this machine's copy is not the one that the driver sampled, and took the fingerprint of."""
    wanted = samples.get(str(checkpoint.folder))
    if checkpoint.folder is not None and wanted is not None and sample(checkpoint.folder) != wanted:
        raise CheckpointError(f"{checkpoint.folder}: not the bytes that the driver sees there. Copy it again, or share the folder.")


def check_node(versions: Mapping[str, str], samples: Mapping[str, str], checkpoints: Iterable[Checkpoint]) -> None:
    """What an actor does before it loads: it may have come to a node that was not there when the nodes were looked at.

    TransplantError where libraries or weights here are not those of the driver, whose name is on what comes of them.
    """
    check_versions(versions)
    for checkpoint in checkpoints:
        check_sample(checkpoint, samples)


def _see_checkpoint(key: str, ours: Checkpoint, samples: Mapping[str, str]) -> None:
    """The same tensors in the same files, which begin and end alike."""
    accept = ["remote_code"] if ours.remote_code else []
    theirs = open_checkpoint(str(ours.folder or ours.model), ours.revision, accept=accept)
    if theirs.tensors != ours.tensors:
        raise CheckpointError(f"`{key}` {ours.model}: other tensors than the driver sees. Copy it again, or share the folder.")
    check_sample(ours, samples)


def _see_organ(key: str, ours: Organ) -> None:
    """The same manifest, which has the hash of the weights, and weights of that layout; the hash was the driver's to compute."""
    folder = Path(str(ours.checkpoint.folder))
    if read_manifest(folder) != ours.manifest or read_header(folder / WEIGHTS) != ours.checkpoint.tensors:
        raise OrganError(f"`{key}` {folder}: another organ than the driver sees. Copy it again, or share the folder.")


def check_versions(wanted: Mapping[str, str]) -> None:
    """UnfitNode where this machine's libraries are other ones than the driver's.

    Builds of one version are alike: a head without GPUs may have torch for CPUs beside workers with torch for CUDA.
    """
    here = versions(wanted)
    pairs = [(name, here[name], version) for name, version in wanted.items()]
    differing = [
        f"{name} {ours} (the driver has {theirs})" for name, ours, theirs in pairs if public_version(ours) != public_version(theirs)
    ]
    if differing:
        raise UnfitNode(f"other versions: {', '.join(differing)}. Install the same on all nodes.")


def _see_storage(shelf: Shelf, token: str) -> None:
    try:
        same = shelf.read(f"{token}/{DRIVER}") == token.encode()
    except TransplantError:
        same = False
    if not same:
        place = redact(shelf.place)
        raise ResourceError(f"`storage`: {place} is not what the driver sees there. Use a place that all nodes share.")
    shelf.write(f"{token}/{uuid4().hex}", b"written")


def _see_gpus(promised: float) -> tuple[str | None, str | None]:
    """Problem and warning. That there are none at all is somebody's decision (tests make it); that torch cannot use them is not."""
    if promised == 0:
        return None, None
    if not any(place.exists() for place in HARDWARE):
        return None, f"Ray promises {promised:g} GPUs and there are none: models run on its CPUs"
    told = _num_gpus_of_torch()
    if told >= promised:
        return None, None
    return f"Ray promises {promised:g} GPUs and torch sees {told}. Check the GPU's driver, and that torch is built for it.", None


def _num_gpus_of_torch() -> int:
    """In a process of its own: Ray hides GPUs from tasks that asked for none."""
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        env=visible, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(told.stdout) if told.returncode == 0 and told.stdout.strip().isdigit() else 0


def _see_tracking(address: str) -> str | None:
    try:
        requests.get(f"{address.rstrip('/')}/health", timeout=REACH_SECONDS).raise_for_status()
    except requests.RequestException as error:
        return f"does not reach `tracking.uri` {redact(address)} ({type(error).__name__}); only the driver has to"
    return None
