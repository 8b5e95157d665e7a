"""What we start listens on loopback alone: a Ray of a sweep's own, and the head of the smoke script."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from integration.helpers import REPOSITORY

SWEEP = """
import sys
import ray
from transplant_ray.distributed.cluster import connect
from transplant_ray.recipe import ResourceSpec

with connect(ResourceSpec()):
    ray.get(ray.remote(num_cpus=1)(lambda: "a worker is there").remote())
    print("up", flush=True)
    sys.stdin.read()
"""


def listeners(process: psutil.Process) -> dict[str, set[str]]:
    """Names of a process and all below it that listen → the addresses on which they do."""
    found: dict[str, set[str]] = {}
    for one in (process, *process.children(recursive=True)):
        try:
            addresses = {each.laddr.ip for each in one.net_connections() if each.status == psutil.CONN_LISTEN}
            found.setdefault(" ".join(one.cmdline()) if one == process else one.name(), set()).update(addresses)
        except psutil.NoSuchProcess:  # a worker that was started too many
            continue
    return {name: addresses for name, addresses in found.items() if addresses}


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def seen_of(command: list[str], folder: Path, **env: str) -> dict[str, set[str]]:
    """What listens once the command says that it is up."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | env
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdin=-1, stdout=-1, stderr=said, text=True)
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = listeners(psutil.Process(process.pid)) if line == "up\n" else {}
        process.communicate(timeout=120)  # the end of its input is its end
    assert found, (folder / "said").read_text()
    return found


def test_a_ray_of_our_own_listens_on_loopback_alone(tmp_path: Path) -> None:
    found = seen_of([sys.executable, "-c", SWEEP], tmp_path)
    assert {"gcs_server", "raylet"} <= found.keys()
    assert [name for name in found if name.startswith("ray::")], "a worker"
    assert not {name: wide for name, addresses in found.items() if (wide := {each for each in addresses if not is_loopback(each)})}


@pytest.mark.slow
def test_so_does_the_head_of_the_smoke_script(tmp_path: Path) -> None:
    """All of the script up to where it submits the job."""
    start, cut, _ = (REPOSITORY / "deploy" / "smoke.sh").read_text().partition("\njob=smoke\n")
    assert cut
    command = ["bash", "-c", f"{start}\necho up\ncat", "deploy/smoke.sh"]
    found = seen_of(command, tmp_path, PYTHON=sys.executable, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert {"gcs_server", "raylet"} <= found.keys()
    assert not {name: wide for name, addresses in found.items() if (wide := {each for each in addresses if not is_loopback(each)})}
