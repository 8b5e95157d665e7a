"""The files under cluster/ and deploy/ are what the tools they are for accept; and every validator refuses a broken copy.

A check raises `Invalid`; a test that only makes one promises that it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import manifests
import pytest
import yaml
from manifests import CRDS, REPOSITORY, Invalid, documents
from ruamel.yaml import YAML

RAY_UP = [REPOSITORY / "cluster" / "aws.yaml", REPOSITORY / "cluster" / "own-machines.yaml"]
KUBERAY = sorted((REPOSITORY / "cluster" / "kuberay").glob("*.yaml"))
KUBERNETES = sorted((REPOSITORY / "deploy" / "kubernetes").glob("*.yaml"))
COMPOSE = REPOSITORY / "deploy" / "compose.yaml"
DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
SCRIPTS = [path for path in manifests.all_files() if path.suffix == ".sh"] + [REPOSITORY / ".ci" / "run"]

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's resource definitions are not in {CRDS}")

Break = Callable[[dict[str, Any]], object]


def broken(path: Path, change: Break, number: int = 0) -> dict[str, Any]:
    document = copy.deepcopy(documents(path)[number])
    change(document)
    return document


def test_every_yaml_file_is_held_against_something() -> None:
    checked = {*RAY_UP, *KUBERAY, *KUBERNETES, COMPOSE, REPOSITORY / "cluster" / "runtime-env.yaml"}
    assert {path for path in manifests.all_files() if path.suffix in {".yaml", ".yml"}} == checked
    assert len(KUBERAY) == len(KUBERNETES) == 4


@pytest.mark.parametrize("path", [path for path in manifests.all_files() if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_no_key_stands_twice(path: Path) -> None:
    assert list(YAML(typ="safe", pure=True).load_all(path)) == list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_files_pass_rays_own_validator(path: Path) -> None:
    manifests.check_ray_up(documents(path)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(idle_minutes=5), "idle_minutes"),
        (lambda config: config.update(max_workers="many"), "many"),
        (lambda config: config["available_node_types"]["gpu"].update(max_wokers=3), "max_wokers"),
        (lambda config: config.update(head_node_type="haed"), "head_node_type"),
        (lambda config: config["available_node_types"]["gpu"]["node_config"].update(InstanceTyp="g6e.xlarge"), "InstanceTyp"),
        (lambda config: config["available_node_types"]["head"]["node_config"].update(SecurityGroupIds="sg-1"), "SecurityGroupIds"),
        (lambda config: config["head_start_ray_commands"].append("ray start --head --dashbord-host=127.0.0.1"), "--dashbord-host"),
    ],
)
def test_a_broken_ray_up_file_is_refused(change: Break, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        manifests.check_ray_up(broken(RAY_UP[0], change))


@needs_crds
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_files_match_the_resource_definitions(path: Path) -> None:
    for document in documents(path):
        manifests.check_kubernetes(document)


@needs_crds
@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec["headGroupSpec"].update(rayStartParam={}), "rayStartParam"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"), "maxReplicas"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "mode"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(livenesProbe={}), "livenesProbe"),
        (lambda spec: spec["headGroupSpec"]["template"]["metadata"].update(label={}), "label"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("template"), "template"),
    ],
)
def test_a_broken_kuberay_file_is_refused(name: str, change: Break, words: str) -> None:
    path = REPOSITORY / "cluster" / "kuberay" / name
    document = broken(
        path, lambda whole: change(whole["spec"] if whole["kind"] == "RayCluster" else whole["spec"]["rayClusterSpec"])
    )
    with pytest.raises(Invalid, match=words):
        manifests.check_kubernetes(document)


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_files_match_the_core_schemas(path: Path) -> None:
    for document in documents(path):
        manifests.check_kubernetes(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document["spec"].update(replica=1), "replica"),
        (lambda document: document["spec"].update(replicas="one"), "one"),
        (lambda document: document["spec"]["template"]["spec"]["containers"][0].pop("name"), "name"),
        (lambda document: document.update(kind="Deploymnet"), "(?i)deploymnet"),
    ],
)
def test_a_broken_kubernetes_file_is_refused(change: Break, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        manifests.check_kubernetes(broken(REPOSITORY / "deploy" / "kubernetes" / "mlflow.yaml", change, number=1))


def test_the_compose_file_matches_the_specification() -> None:
    manifests.check_compose(documents(COMPOSE)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document["services"]["mlflow"].update(heathcheck={}), "heathcheck"),
        (lambda document: document["services"]["s3"].update(command=8333), "command"),
        (lambda document: document.update(volume={}), "volume"),
    ],
)
def test_a_broken_compose_file_is_refused(change: Break, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        manifests.check_compose(broken(COMPOSE, change))


def test_the_dockerfile_passes_the_linter() -> None:
    manifests.check_dockerfile(DOCKERFILE)


@pytest.mark.parametrize(
    ("line", "code"), [("USER root", "DL3002"), ("RUN cd /tmp", "DL3003"), ("WORKDIR here", "DL3000"), ("COPPY a b", "unexpected")]
)
def test_a_broken_dockerfile_is_refused(tmp_path: Path, line: str, code: str) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(f"{DOCKERFILE.read_text()}\n{line}\n")
    with pytest.raises(Invalid, match=code):
        manifests.check_dockerfile(path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_the_linter(path: Path) -> None:
    manifests.check_shell(path)


@pytest.mark.parametrize(("line", "code"), [("rm -rf $1/*", "SC2115"), ("if true; then", "SC1073")])
def test_a_broken_shell_script_is_refused(tmp_path: Path, line: str, code: str) -> None:
    path = tmp_path / "script.sh"
    path.write_text(f"#!/bin/bash\n{line}\n")
    with pytest.raises(Invalid, match=code):
        manifests.check_shell(path)
