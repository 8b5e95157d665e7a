"""What the files under cluster/ and deploy/ promise: pinned versions, nobody is root, no secret, no listener wider than needed.

A check raises `Invalid`; a test that only makes one promises that it does not.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import manifests
import mlflow.environment_variables
import pytest
import yaml
from manifests import REPOSITORY, Invalid, all_files, documents
from mlflow.cli import server
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray.autoscaler._private import commands

from transplant_ray.distributed.packing import STOP_SECONDS, read_environment
from transplant_ray.pipeline.ending import GRACE_SECONDS
from transplant_ray.recipe import Acceptance, load_recipe

CLUSTER, DEPLOY = REPOSITORY / "cluster", REPOSITORY / "deploy"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
YAML = [(path, document) for path in all_files() if path.suffix == ".yaml" for document in documents(path)]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OWN = documents(CLUSTER / "own-machines.yaml")[0]
COMPOSE = documents(DEPLOY / "compose.yaml")[0]
MLFLOW = documents(DEPLOY / "kubernetes" / "mlflow.yaml")[1]["spec"]["template"]["spec"]["containers"][0]


def test_every_version_is_the_one_that_the_tests_ran_with() -> None:
    text = "\n".join(path.read_text() for path in all_files())
    assert set(re.findall(r"transplant-ray:([\w.]+)", text)) == {PROJECT["version"]}
    assert set(re.findall(r"transplant-ray:[\w.]+-(\w+)", text)) == {"cpu", "cuda"}
    assert set(re.findall(r"transplant-ray-mlflow:([\w.]+)", text)) == {PINS["mlflow"]}
    assert {document["spec"]["rayVersion"] for _, document in YAML if document.get("kind") == "RayCluster"} == {PINS["ray"]}


def test_no_image_is_without_a_version_and_each_has_one_everywhere() -> None:
    text = "\n".join(path.read_text() for path in all_files() if path.suffix == ".yaml")
    images = re.findall(r"^ *(?:- )?(?:head_|worker_)?image: (\S+)$", text, re.MULTILINE)
    assert len(images) >= 10
    versions: dict[str, set[str]] = {}
    for image in images:
        name, _, version = image.rpartition("/")[2].partition(":")
        assert re.match(r"\d+\.\d+", version), image
        versions.setdefault(name, set()).add(version.removesuffix("-cpu").removesuffix("-cuda"))
    assert versions.keys() == {"transplant-ray", "transplant-ray-mlflow", "postgres", "seaweedfs"}
    assert all(len(found) == 1 for found in versions.values()), versions


def test_the_images_install_nothing_but_pinned_packages() -> None:
    assert "PIP_CONSTRAINT=/constraints.txt" in DOCKERFILE
    assert "COPY constraints.txt /" in DOCKERFILE
    installed = {
        word for line in re.findall(r"pip install (.*)", DOCKERFILE) for word in re.sub(r"--index-url \S+|--\S+", "", line).split()
    }
    assert installed == {'"/src[lora,lm_eval]"', "torch", "mlflow", "psycopg2-binary", "boto3"}
    extras = [line for name in ("lora", "lm_eval") for line in PROJECT["optional-dependencies"][name]]
    wanted = _closure([*PROJECT["dependencies"], *extras, "torch", "mlflow", "psycopg2-binary", "boto3"])
    assert len(wanted) > 100
    assert wanted <= {canonicalize_name(name) for name in PINS}
    python = re.search(r"ARG PYTHON=([\d.]+)-slim", DOCKERFILE)
    assert python is not None
    assert python[1] in SpecifierSet(PROJECT["requires-python"])


def _closure(lines: Iterable[str]) -> set[str]:
    """What pip would install for these, as the installed packages say, less what PyTorch asks for where it is CUDA's."""
    left, seen = [Requirement(line) for line in lines], set[tuple[str, frozenset[str]]]()
    while left:
        one = left.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key not in seen and key[0].partition("-")[0] not in {"cuda", "nvidia", "triton"}:
            seen.add(key)
            asked = map(Requirement, importlib.metadata.requires(one.name) or ())
            extras = one.extras or {""}
            left += [need for need in asked if need.marker is None or any(need.marker.evaluate({"extra": each}) for each in extras)]
    return {name for name, _ in seen}


def test_no_link_of_the_image_leads_nowhere(tmp_path: Path) -> None:
    """`COPY` keeps links as they are, and those among the recipes lead out of the folder."""
    (tmp_path / "opt").mkdir()
    for *sources, target in (words.split() for words in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE)):
        for source in map(REPOSITORY.joinpath, sources):
            place = tmp_path / target.strip("/")
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True)
            else:
                place.mkdir(exist_ok=True)
                shutil.copy2(source, place)
    (command,) = re.findall(r"^RUN (cp .*)", DOCKERFILE, re.MULTILINE)
    subprocess.run(command.replace(" /", f" {tmp_path}/"), shell=True, check=True)
    ((made, at),) = re.findall(r"^COPY --from=packages (\S+) (/opt/transplant-ray/\S+)", DOCKERFILE, re.MULTILINE)
    place = tmp_path / made.strip("/")
    assert {path.name for path in place.rglob("*.yaml")} == {path.name for path in (REPOSITORY / "jobs").rglob("*.yaml")}
    assert not [path for path in place.rglob("*") if path.is_symlink()]
    entrypoint = documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]["spec"]["entrypoint"]
    named = [word.removeprefix(f"{at}/") for word in entrypoint.split() if word.startswith("/opt/")]
    assert len(named) == 2
    assert all((place / name).is_file() for name in named)


def test_the_autoscaler_in_the_heads_container_finds_what_it_reaches_workers_by() -> None:
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends (.*) \\", DOCKERFILE)
    assert set(packages.split()) == {"openssh-client", "rsync"}


def test_a_head_has_no_gpu_of_the_machine_that_it_shares() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    assert [name for name, text in stages.items() if "NVIDIA" in re.sub(r"#.*", "", text)] == ["runtime-cuda"]
    assert all(spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0" for spec in _clusters())


def test_the_volumes_that_kuberay_makes_are_left_to_it_or_have_its_names() -> None:
    """A smaller /dev/shm sends the object store to the disk; of /tmp/ray by another name the autoscaler would get its own."""
    for spec in _clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert places == {"/shared": "shared", "/tmp/ray": "ray-logs"}
            assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == set(places.values())


def test_the_build_context_is_a_list_of_what_is_copied() -> None:
    """No key, database or environment of a working folder can get into a layer."""
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]}
    assert allowed == copied
    assert all((REPOSITORY / name).exists() for name in copied)


def test_every_image_that_can_be_built_runs_as_somebody() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    users = {re.search(r"AS (\S+)", stage)[1]: re.findall(r"^USER (\S+)", stage, re.MULTILINE) for stage in stages}  # type: ignore[index]
    assert users["node"] == users["mlflow"] == ["1000:1000"]
    assert list(users)[-1] == "node", "what `docker build` makes without --target"


def test_nobody_is_root_in_a_pod_or_a_service() -> None:
    pods = [pod for _, document in YAML for pod in manifests.pods(document)]
    assert len(pods) == 8
    for pod in pods:
        manifests.check_confined(pod)
    for name, service in COMPOSE["services"].items():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod.pop("securityContext"),
        lambda pod: pod["securityContext"].update(runAsUser=0),
        lambda pod: pod["containers"][0].pop("securityContext"),
        lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
        lambda pod: pod.update(initContainers=[{"name": "first"}]),
    ],
)
def test_a_pod_that_could_be_root_is_found(change: Callable[[dict[str, Any]], object]) -> None:
    (pod,) = manifests.pods(copy.deepcopy(documents(DEPLOY / "kubernetes" / "postgres.yaml")[1]))
    change(pod)
    with pytest.raises(Invalid, match=r"root|privileges"):
        manifests.check_confined(pod)


@pytest.mark.parametrize("path", [path for path in all_files() if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    for document in documents(path):
        manifests.check_no_secret(document)


@pytest.mark.parametrize(
    "leak",
    [
        {"kind": "Secret", "stringData": {}},
        {"env": [{"name": "POSTGRES_PASSWORD", "value": "hunter2"}]},
        {"environment": {"AWS_SECRET_ACCESS_KEY": "hunter2"}},
        {"environment": ["AWS_SECRET_ACCESS_KEY=hunter2"]},
        {"args": ["--backend-store-uri=postgresql://mlflow:hunter2@postgres/mlflow"]},
        {"environment": {"POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:-hunter2}"}},
    ],
)
def test_a_secret_in_a_file_is_found(leak: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        manifests.check_no_secret(leak)


def test_passwords_are_made_once_for_compose_and_kubernetes_alike(tmp_path: Path) -> None:
    script = tmp_path / "make-env.sh"
    script.write_text((DEPLOY / "make-env.sh").read_text())
    first = _made(script)
    names = dict(line.split("=") for line in first.splitlines())
    assert all(len(value) > 20 for value in names.values())
    assert len(set(names.values())) == len(names)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert _made(script) == first, "a second call would lock the database's owner out"
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == names.keys()
    kubernetes = "".join(path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml"))
    assert set(re.findall(r"secretKeyRef: \{name: mlflow, key: (\w+)\}", kubernetes)) == names.keys()


def _made(script: Path) -> str:
    subprocess.run(["bash", str(script)], check=True, capture_output=True)
    return (script.parent / ".env").read_text()


def test_nothing_listens_wider_than_needed() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert COMPOSE["networks"]["back"]["internal"] is True
    for _, document in YAML:
        if document.get("kind") == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert "hostNetwork" not in json.dumps(document)
    for name in ("aws.yaml", "own-machines.yaml"):
        starts = [line for line in documents(CLUSTER / name)[0]["head_start_ray_commands"] if "ray start" in line]
        assert all("--dashboard-host=127.0.0.1" in line for line in starts)
    assert "--host 127.0.0.1" in (DEPLOY / "mlflow-server.sh").read_text()


def test_every_pod_of_ours_is_behind_a_network_policy() -> None:
    policies = [document["spec"] for _, document in YAML if document.get("kind") == "NetworkPolicy"]
    selectors = [policy["podSelector"] for policy in policies]
    guarded = {selector["matchLabels"]["app.kubernetes.io/name"] for selector in selectors if "matchLabels" in selector}
    guarded |= {name for selector in selectors for rule in selector.get("matchExpressions", ()) for name in rule["values"]}
    labels = set(
        re.findall(r"^ +labels: \{app.kubernetes.io/name: (\S+)\}", "\n".join(p.read_text() for p, _ in YAML), re.MULTILINE)
    )
    assert labels == guarded == {"transplant-ray", "mlflow", "mlflow-postgres", "mlflow-s3"}
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)


def test_prometheus_reaches_the_metrics_of_every_node_and_nothing_else() -> None:
    rules = documents(CLUSTER / "kuberay" / "network.yaml")[0]["spec"]["ingress"]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    (opened,) = [rule["ports"] for rule in rules if monitoring in rule["from"]]
    cluster = _clusters()[0]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        metrics = [port["containerPort"] for port in container["ports"] if port["name"] == "metrics"]
        assert opened == [{"protocol": "TCP", "port": port} for port in metrics]


def test_every_cluster_asks_for_the_token() -> None:
    for name in ("aws.yaml", "own-machines.yaml"):
        config = documents(CLUSTER / name)[0]
        starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 2
        assert all("RAY_AUTH_MODE=token" in line for line in starts)
        assert "~/.ray/auth_token" in config["file_mounts"].values()
    for spec in _clusters():
        assert spec["authOptions"] == {"mode": "token"}


def _clusters() -> list[dict[str, Any]]:
    cluster = documents(CLUSTER / "kuberay" / "raycluster.yaml")[0]["spec"]
    return [cluster, documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]["spec"]["rayClusterSpec"]]


def test_the_job_runs_on_the_same_cluster_as_the_one_that_stays() -> None:
    cluster, of_job = _clusters()
    assert cluster == of_job


def test_gpu_workers_come_and_go_and_are_watched() -> None:
    cluster = _clusters()[0]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert worker["image"].endswith("-cuda")
    assert head["image"].endswith("-cpu")
    for container in (head, worker):
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    config = documents(CLUSTER / "aws.yaml")[0]
    gpu = config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"]) == (0, 8)
    assert config["idle_timeout_minutes"] == 10
    assert config["docker"]["head_image"].endswith("-cpu")
    assert config["docker"]["worker_image"].endswith("-cuda")


def test_a_job_has_time_to_end_and_sees_the_same_variables_by_whatever_way_it_comes() -> None:
    bare = read_environment(CLUSTER / "runtime-env.yaml")["env_vars"]
    of_job = yaml.safe_load(documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert bare == of_job
    assert bare["RAY_JOB_STOP_WAIT_TIME_S"] == STOP_SECONDS
    assert float(STOP_SECONDS) > GRACE_SECONDS


GROWING = ("kuberay/rayjob.yaml", "kuberay/raycluster.yaml", "aws.yaml")


@pytest.mark.parametrize("name", GROWING)
def test_where_workers_come_only_when_asked_for_a_sweep_is_told_to_wait_for_them(name: str) -> None:
    assert _least_workers(documents(CLUSTER / name)[0]) == 0
    overrides = re.findall(r"\b(?:resources|storage|tracking)\.?\w*=[^\s()]+", (CLUSTER / name).read_text())
    resources = load_recipe(REPOSITORY / "jobs" / "recipes" / "cross-generation.yaml", overrides).resources
    assert resources.gpus_per_model == 1
    assert resources.evaluators == "auto"
    assert resources.wait >= 600, "a machine, its image and Ray take minutes to come"


def _least_workers(config: dict[str, Any]) -> int:
    spec = config.get("spec", {})
    groups = spec.get("rayClusterSpec", spec).get("workerGroupSpecs")
    if groups is None:
        return int(config["available_node_types"]["gpu"]["min_workers"])
    return int(min(min(group["replicas"], group["minReplicas"]) for group in groups))


def test_workers_and_heads_have_a_role_by_which_work_is_placed() -> None:
    cluster = _clusters()[0]
    types = documents(CLUSTER / "aws.yaml")[0]["available_node_types"]
    roles = [
        (cluster["headGroupSpec"]["labels"], cluster["workerGroupSpecs"][0]["labels"]),
        (types["head"]["labels"], types["gpu"]["labels"]),
    ]
    assert roles == [({"role": "head"}, {"role": "gpu"})] * 2
    assert "--labels=role=head" in OWN["head_start_ray_commands"][1]
    assert "--labels=role=gpu" in OWN["worker_start_ray_commands"][1]


def test_machines_of_ones_own_get_what_pip_needs_and_no_more() -> None:
    """Ray reads every file of a mount each time; the root of a working folder has environments, runs and secrets in it."""
    mounts = dict(OWN["file_mounts"])
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all(remote == f"~/transplant_ray/{local}" for remote, local in mounts.items())
    assert set(mounts.values()) == {
        "constraints.txt",
        "pyproject.toml",
        PROJECT["readme"],
        *PROJECT["license-files"],
        "transplant_ray",
    }
    extras = [re.findall(r"/transplant_ray\[([\w,]+)\]\"$", command) for command in OWN["head_setup_commands"]]
    assert extras[-1] == re.findall(r"/src\[([\w,]+)\]", DOCKERFILE), "as in the image"


def test_the_environment_is_put_on_the_path_once(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'\n")
    (command,) = OWN["setup_commands"]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, check=True)
    text = (tmp_path / ".bashrc").read_text()
    assert text == "alias ll='ls -l'\nexport PATH=/shared/venv/bin:$PATH\n"


def test_machines_of_ones_own_get_the_autoscaler_that_knows_them_and_no_key_of_a_person() -> None:
    assert "RAY_UP_enable_autoscaler_v2" in inspect.getsource(commands.get_or_create_head_node)
    for path in (CLUSTER / "own-machines.yaml", REPOSITORY / "README.md"):
        assert "RAY_UP_enable_autoscaler_v2=0 ray up" in path.read_text()
    assert OWN["auth"]["ssh_private_key"] == "~/.ssh/transplant-ray"


def test_the_server_is_started_with_flags_that_it_has_and_the_same_everywhere() -> None:
    parsed = [
        server.make_context("mlflow server", list(words)).params
        for words in (COMPOSE["services"]["mlflow"]["command"], MLFLOW["args"])
    ]
    compose, kubernetes = parsed
    assert compose["host"] == "0.0.0.0"  # of its own network; what is published is on loopback
    assert "*" not in compose["allowed_hosts"] + compose["cors_allowed_origins"]
    assert compose["disable_security_middleware"] is False
    assert kubernetes | {"backend_store_uri": compose["backend_store_uri"]} == compose
    assert kubernetes["backend_store_uri"] == compose["backend_store_uri"].replace("@postgres:", "@mlflow-postgres:")


def test_the_server_has_the_same_settings_everywhere_and_runs_no_jobs() -> None:
    compose = COMPOSE["services"]["mlflow"]["environment"]
    kubernetes = {entry["name"]: entry.get("value") for entry in MLFLOW["env"]}
    assert kubernetes.keys() == compose.keys()
    name = mlflow.environment_variables.MLFLOW_SERVER_ENABLE_JOB_EXECUTION.name
    assert compose[name] == kubernetes[name] == "false"
    assert f"{name}=false" in (DEPLOY / "mlflow-server.sh").read_text()


def test_a_database_that_is_still_being_made_is_not_ready() -> None:
    """The image makes it with a server that has a socket alone, and starts the real one afterwards."""
    (container,) = documents(DEPLOY / "kubernetes" / "postgres.yaml")[1]["spec"]["template"]["spec"]["containers"]
    asked = [container[f"{probe}Probe"]["exec"]["command"] for probe in ("liveness", "readiness")]
    asked.append(COMPOSE["services"]["postgres"]["healthcheck"]["test"][1:])
    assert all(command[:2] == ["pg_isready", "--host=127.0.0.1"] for command in asked)


def test_security_names_all_that_a_recipe_can_accept_and_only_files_that_there_are() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) - {"accept"} == set(get_args(Acceptance)) - {
        "vocabulary",
        "segmentation",
    }
    named = re.findall(r"`((?:cluster|deploy)/[\w./-]*)`", text + (REPOSITORY / "README.md").read_text())
    assert len(named) > 10
    assert not [path for path in named if not (REPOSITORY / path).exists()]
