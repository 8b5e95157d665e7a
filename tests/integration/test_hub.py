"""Models by hub id, against a hub on this machine: headers by range requests, then the download; revisions; what is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from integration.helpers import Place, weight_bytes
from integration.hub_server import Hub, Request, running
from tiny import save_tiny

REPOSITORY = "someone/tiny"
OLD, NEW = "a" * 40, "b" * 40
WIDE = 256  # so that a file is larger than the 100 kB that are read to find its header

# The hub's client reads HF_ENDPOINT when it is imported, so this runs in a process of its own. It prints one JSON object.
SCRIPT = """
import json, sys, urllib.request
from transplant_ray.errors import TransplantError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.pipeline.job import prepare
from transplant_ray.pipeline.planning import make_plan
from transplant_ray.recipe import load_recipe
import huggingface_hub.constants

said = {}
def mark(name): urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/mark?{name}").read()
def error(name, model, revision=None):
    try: open_checkpoint(model, revision)
    except TransplantError as problem: said[name] = f"{type(problem).__name__}: {problem}"

job = prepare(load_recipe(sys.argv[1]))
said["modules"] = make_plan(job).modules_per_kind["all"]
said["revisions"] = [job.comparison.source.revision, job.comparison.target.revision]
mark("planned")
folder = job.comparison.target.fetch()
said["folder"] = str(folder)
said["parameters"] = sum(p.numel() for p in load_model(job.comparison.target, "float32").parameters())
error("unknown repository", "someone/nobody-knows")
error("unknown revision", "someone/tiny", "v9")
error("no id", "not an id")
huggingface_hub.constants.ENDPOINT = sys.argv[2]
error("hub away", "someone/tiny")
print(json.dumps(said))
"""


FETCH = """
import sys, urllib.request
from transplant_ray.models.checkpoint import open_checkpoint
import huggingface_hub.constants

checkpoint = open_checkpoint("someone/tiny", "v1")
urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/mark?opened").read()
print(checkpoint.fetch())
"""


@dataclass(frozen=True)
class Visit:
    said: dict[str, Any]
    planning: list[Request]
    loading: list[Request]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def visit(template: Place, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """One process that plans, loads and fails, for every process imports torch and transformers."""
    home = tmp_path_factory.mktemp("hub")
    folders = {
        OLD: save_tiny(home / OLD, seed=1, intermediate_size=WIDE, shard="60KB"),
        NEW: save_tiny(home / NEW, seed=2, intermediate_size=WIDE),
    }
    place = template.copy(home / "place")
    recipe = place.recipe(source={"model": REPOSITORY, "revision": "v1"}, target={"model": REPOSITORY})
    with running(Hub(REPOSITORY, folders, {"main": NEW, "v1": OLD})) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", SCRIPT, str(recipe), "http://127.0.0.1:1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (mark,) = [index for index, request in enumerate(hub.log) if request.file == "planned"]
    return Visit(json.loads(done.stdout.splitlines()[-1]), hub.log[:mark], hub.log[mark + 1 :], folders)


def test_planning_reads_headers_and_no_weights(visit: Visit) -> None:
    assert visit.said["modules"] == 21
    asked = [request for request in visit.planning if request.file.endswith(".safetensors")]
    size = (visit.folders[NEW] / "model.safetensors").stat().st_size
    assert {request.method for request in asked} == {"GET", "HEAD"}
    assert max(request.num_bytes for request in asked) <= 100_001 < size / 2


def test_loading_downloads_each_file_once_and_gets_its_bytes(visit: Visit) -> None:
    size = (visit.folders[NEW] / "model.safetensors").stat().st_size
    full = [request for request in visit.loading if request.file.endswith(".safetensors") and request.num_bytes]
    assert [request.num_bytes for request in full] == [size]
    assert weight_bytes(Path(visit.said["folder"])) == weight_bytes(visit.folders[NEW])


@pytest.mark.slow
def test_two_evaluators_of_a_node_that_load_at_once_fetch_each_file_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / OLD, seed=1, intermediate_size=WIDE, shard="60KB")
    with running(Hub(REPOSITORY, {OLD: folder}, {"v1": OLD}, gate=threading.Barrier(2), seconds=0.5)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        pair = [
            subprocess.Popen([sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        told = [process.communicate(timeout=300)[0].strip() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert told[0] == told[1]
    assert weight_bytes(Path(told[0])) == weight_bytes(folder)
    shards = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    opened = [request.file for request in hub.log].index("opened")  # headers were read before; small files are read whole for them
    whole = Counter(request.file for request in hub.log[opened:] if request.num_bytes and request.file in shards)
    assert whole == dict.fromkeys(shards, 1)


def test_a_revision_is_honoured_and_recorded_as_a_commit(visit: Visit) -> None:
    assert visit.said["revisions"] == [OLD, NEW]
    assert weight_bytes(visit.folders[OLD]) != weight_bytes(visit.folders[NEW])


@pytest.mark.parametrize("name", ["unknown repository", "unknown revision", "no id", "hub away"])
def test_what_the_hub_does_not_give_is_refused_with_what_to_do(visit: Visit, name: str) -> None:
    said = visit.said[name]
    assert said.startswith("CheckpointError: ")
    assert "the hub did not give it" in said
    assert "Check the path or id, the revision, the network, and `hf auth login`" in said
