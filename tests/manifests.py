"""What the files under cluster/ and deploy/ are held against, offline. Each check raises `Invalid`, saying what is wrong."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import click
import jsonschema
import kubernetes_validate
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

REPOSITORY = Path(__file__).parents[1]
CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay-crds"
KUBERNETES = "1.34"
"""Not the newest: what a manifest needs should be in clusters that people have."""


class Invalid(Exception):
    """A file that the tool it is for would refuse."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def all_files() -> list[Path]:
    """Whatever is under cluster/ and deploy/, and what git does not see aside."""
    found = (path for folder in ("cluster", "deploy") for path in sorted((REPOSITORY / folder).rglob("*")))
    return [path for path in found if path.is_file() and path.name != ".env"]


def check_ray_up(config: dict[str, Any]) -> None:
    """Ray's own schema and validator, the flags of `ray start`, and for AWS the parameters of the call that starts a machine."""
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except (jsonschema.ValidationError, ValueError, RuntimeError) as error:
        raise Invalid(str(error).splitlines()[0]) from error
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        if found := re.search(r"\bray start (.*)", command):
            _check_flags(found[1])
    if config["provider"]["type"] == "aws":
        for machine in config["available_node_types"].values():
            _check_request("RunInstances", {**machine["node_config"], "MinCount": 1, "MaxCount": 1})


def _check_flags(words: str) -> None:
    try:
        start.make_context("ray start", shlex.split(words))
    except click.ClickException as error:
        raise Invalid(str(error)) from error


def _check_request(operation: str, parameters: dict[str, Any]) -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model(operation)
    if report := ParamValidator().validate(parameters, model.input_shape).generate_report():
        raise Invalid(report)


def check_kubernetes(document: dict[str, Any]) -> None:
    """Core kinds against Kubernetes' schemas, KubeRay's against its resource definitions; fields that nobody knows are refused."""
    if document["apiVersion"].startswith("ray.io/"):
        _check_schema(document, _crd(document["kind"], document["apiVersion"].partition("/")[2]))
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Invalid(f"Kubernetes {KUBERNETES} has no {document['apiVersion']} {document['kind']}") from error
    except kubernetes_validate.ValidationError as error:
        raise Invalid(str(error)) from error


def check_compose(document: dict[str, Any]) -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    _check_schema(document, json.loads(vendored.read_text()))


def _check_schema(document: dict[str, Any], schema: dict[str, Any]) -> None:
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(document))
    if error is not None:
        raise Invalid(f"{error.json_path}: {error.message[:300]}")


@functools.cache
def _crd(kind: str, version: str) -> dict[str, Any]:
    definition = yaml.load(
        (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    (found,) = [entry for entry in definition["spec"]["versions"] if entry["name"] == version]
    schema: dict[str, Any] = found["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"]["properties"] = {
        name: {} for name in ("name", "generateName", "namespace", "labels", "annotations")
    }
    return _strict(schema)


def _strict(schema: Any) -> Any:
    """The same, but an object has no fields beyond its own: Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def check_dockerfile(path: Path) -> None:
    _run("hadolint", "--no-color", path)


def check_shell(path: Path) -> None:
    _run("shellcheck", path)


def _run(tool: str, *arguments: object) -> None:
    """A linter that pip has put beside the interpreter."""
    command = [str(Path(sys.executable).with_name(tool)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Invalid(done.stdout + done.stderr)


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in a document, however deep."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for entry in node:
            yield from pods(entry)


def check_confined(pod: dict[str, Any]) -> None:
    """Nothing in a pod runs as root, or becomes it."""
    person = pod.get("securityContext", {})
    if person.get("runAsNonRoot") is not True or not person.get("runAsUser"):
        raise Invalid(f"a pod that may run as root: {person}")
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            raise Invalid(f"{container['name']} may gain privileges: {context}")
        if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False or context.get("privileged"):
            raise Invalid(f"{container['name']} runs as root: {context}")


SECRET = re.compile(r"password|secret|token|access_?key|credential", re.IGNORECASE)
HARMLESS = {("HttpTokens", "required")}
"""A setting of AWS that is named like a secret."""


def check_no_secret(node: Any, name: str = "") -> None:
    """No value where a name says secret: a reference to one, or a path to it, is all that a file may hold."""
    if isinstance(node, dict):
        if node.get("kind") == "Secret":
            raise Invalid("a Secret is in a file")
        if "value" in node and SECRET.search(str(node.get("name", ""))):
            raise Invalid(f"{node['name']} has a literal value")
        for key, value in node.items():
            check_no_secret(value, str(key))
    elif isinstance(node, list):
        for entry in node:
            assignment = (
                re.match(r"([A-Za-z_]+)=(.*)", entry) if isinstance(entry, str) else None
            )  # Compose's other way to write them
            check_no_secret(assignment[2] if assignment else entry, assignment[1] if assignment else name)
    elif isinstance(node, str):
        if re.search(r"//[^/\s@]+:[^/\s@$]+@", node):
            raise Invalid("an address with a password")
        if SECRET.search(name) and (name, node) not in HARMLESS and not re.match(r"\$\{[A-Z_]+:\?|~/", node):
            raise Invalid(f"{name} has a literal value")
