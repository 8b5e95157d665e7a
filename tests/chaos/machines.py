"""Several nodes in this machine, and the processes on them that may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

FAST_DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""Of nodes that are dead: Ray's own defaults take half a minute."""
HEAD = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "_system_config": FAST_DETECTION}
"""Ray's dashboard is nine processes, and nobody looks at it here."""
ROLES = ("source", "target")


@dataclass
class Machines:
    """A head without GPUs, and a node with one logical GPU for each role."""

    cluster: Cluster
    nodes: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, role: str, **settings: Any) -> None:
        self.nodes[role] = self.cluster.add_node(num_cpus=2, num_gpus=1, labels={"role": role}, **settings)

    def kill(self, role: str) -> None:
        """As by pulling the plug."""
        self.cluster.remove_node(self.nodes.pop(role), allow_graceful=False)

    def workers(self, title: str, role: str | None = None) -> list[psutil.Process]:
        """Processes of Ray's workers that do this now, on the node of a role or on any."""
        nodes = [self.cluster.head_node, *self.nodes.values()] if role is None else [self.nodes[role]]
        raylets = [raylet.process.pid for node in nodes for raylet in node.all_processes.get("raylet", [])]
        return [worker for raylet in raylets for worker in children(raylet) if titled(worker).startswith(f"ray::{title}")]


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def titled(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:  # it has just ended
        return ""


@contextmanager
def machines(**head: Any) -> Iterator[Machines]:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD | head)
    try:
        gathered = Machines(cluster)
        for role in ROLES:
            gathered.add(role)
        yield gathered
    finally:
        cluster.shutdown()


@dataclass
class Sweep:
    """A sweep in a process of its own, so that it can be killed too."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 800) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the sweep did not end within {seconds} seconds; it said:\n{self.said}") from None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def sweep(recipe: Path, *overrides: str) -> Iterator[Sweep]:
    log = recipe.parent / "said.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "transplant_ray.cli", "sweep", str(recipe), *overrides],
            cwd=recipe.parent, start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    running = Sweep(process, log)
    try:
        yield running
    finally:
        if process.poll() is None:
            running.kill()


def until(ready: Callable[[], Any], running: Sweep, seconds: float = 500) -> Any:
    """What `ready` gives once it is something; None where the sweep ends first."""
    end = time.monotonic() + seconds
    while running.process.poll() is None:
        if found := ready():
            return found
        assert time.monotonic() < end, f"nothing came for {seconds} seconds; the sweep said:\n{running.said}"
        time.sleep(0.05)
    return None
