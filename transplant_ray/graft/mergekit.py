"""Merges as mergekit knows them (https://github.com/arcee-ai/mergekit): a variant as its YAML, and its command run on such YAML.

mergekit gives a tensor one weight for each model. A weight's filter is a part of a tensor's name, and the first that matches wins.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from transplant_ray.errors import CheckpointError, RecipeError, VariantError
from transplant_ray.graft.variant import Variant, check_variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.compare import Comparison
from transplant_ray.models.header import DTYPES, FLOATS, brief

COMMAND = "mergekit-yaml"
PLACE = "TRANSPLANT_RAY_MERGEKIT"
"""Environment variable with the path of `mergekit-yaml`, where it is not on PATH and not beside this Python."""
PIP_LINE = "pip install mergekit==0.1.5"
LONGEST_SECONDS = 6 * 3600

Config = dict[str, Any]


def variant_config(comparison: Comparison, variant: Variant) -> Config:
    """A linear merge whose output has the tensors of `export_checkpoint(comparison, variant)`.

    Equal in every element for coefficients 0 and 1. A blend is rounded differently: mergekit computes (1 − c)·Wt + c·Ws where
    `blend` takes `torch.lerp`. For c in [0, 1] that makes at most 2⁻²¹·(|Wt| + |Ws|) in float32, and then one unit in the last
    place of a narrower dtype. VariantError where mergekit cannot say it: a coefficient per channel, other shapes, several dtypes.
    """
    modules = {name: pair.target for name, pair in comparison.pairs.items()}
    check_variant(variant, modules)
    if channelled := [name for name, c in variant.coefficients.items() if isinstance(c, tuple)]:
        raise VariantError(
            f"variant: {channelled[0]} has a coefficient per channel, and mergekit has one weight for a tensor. "
            "Export it as a checkpoint."
        )
    _check_same_shapes(comparison.target, comparison.source)
    values = {
        part: c
        for name, c in variant.coefficients.items()
        for part in _filters(modules[name], comparison.target)
        if isinstance(c, float)
    }
    source = [{"filter": part, "value": c} for part, c in values.items()]
    target = [{"filter": part, "value": 1 - c} for part, c in values.items()]
    weights = ((comparison.target, [*target, {"value": 1.0}]), (comparison.source, [*source, {"value": 0.0}]))
    return {
        "merge_method": "linear",
        "base_model": _reference(comparison.target),  # gives config and tokenizer
        **_dtypes(comparison.target, comparison.source),
        "parameters": {"normalize": False},
        "models": [{"model": _reference(model), "parameters": {"weight": weight}} for model, weight in weights],
    }


def variant_yaml(comparison: Comparison, variant: Variant) -> str:
    """The text of `variant_config`, for `mergekit-yaml FILE OUT`."""
    head = f"# Variant {variant.id} of transplant_ray as a linear merge: {COMMAND} THIS_FILE OUT_FOLDER\n"
    return head + config_yaml(variant_config(comparison, variant))


def config_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def merge_config(method: str, base: Checkpoint, models: Sequence[Checkpoint], scale: float, density: float | None = None) -> Config:
    """base + scale · merge of the task vectors of `models`, each of weight 1, by one of mergekit's methods, e.g. `ties`.

    `density` is the share of every task vector that is kept; None for a method that keeps all. A model that is the base itself has
    no task vector and is left out. The dtype is that of the first model. VariantError where shapes or dtypes differ.
    """
    others = {_place(model): model for model in models if _place(model) != _place(base)}
    for model in (base, *others.values()):
        _check_same_shapes(models[0], model)
    each = {"weight": 1.0} | ({} if density is None else {"density": density})
    return {
        "merge_method": method,
        "base_model": _reference(base),
        **_dtypes(*models, base),
        "parameters": {"lambda": scale},
        "models": [{"model": _reference(model), "parameters": dict(each)} for model in others.values()],
    }


def find_mergekit() -> Path | None:
    """`mergekit-yaml`: where the environment variable says, beside this Python, or on PATH; None where it is not installed.

    RecipeError where the environment variable names something that is not there.
    """
    if said := os.environ.get(PLACE):
        if not Path(said).is_file():
            raise RecipeError(f"{PLACE}={said}: no such file. Give the path of `{COMMAND}`, or unset it.")
        return Path(said)
    found = shutil.which(COMMAND, path=str(Path(sys.executable).parent)) or shutil.which(COMMAND)
    return Path(found) if found else None


def run_mergekit(program: Path, recipe: Path, out: Path, *, seed: int, options: Iterable[str] = ()) -> Path:
    """Write the folder `out` as the YAML `recipe` says, on CPU; returns `out`. CheckpointError with mergekit's last words."""
    command = [str(program), str(recipe), str(out), "--quiet", "--no-write-model-card", "--random-seed", str(seed), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(f"{COMMAND}: did not make a checkpoint ({brief(error)}). Run it on {recipe} by hand.") from error
    if done.returncode:
        last = (done.stderr.strip() or "without a word").splitlines()[-1]
        raise CheckpointError(f"{COMMAND} {recipe}: ended with {done.returncode}: {last}")
    return out


def _filters(module: Module, target: Checkpoint) -> list[str]:
    """What finds the module's tensors, and no others, by a part of their name.

    Begins at the list of layers: what stands before it may be missing from a file, and mergekit has names of its own.
    """
    layers = module.disk_weight.removesuffix(f".{module.path}.weight").split(".")[-2:]
    parts = [".".join([*layers, module.path, what]) for what in ("weight", "bias")[: 2 if module.disk_bias else 1]]
    for part in parts:
        if (count := sum(part in name for name in target.tensors)) != 1:
            raise VariantError(
                f"variant: {part!r} is part of {count} names of tensors, and a filter of mergekit must find one alone."
            )
    return parts


def _check_same_shapes(target: Checkpoint, other: Checkpoint) -> None:
    for name, info in target.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None or theirs.shape != info.shape:
            found = "is missing" if theirs is None else f"is {theirs.shape}"
            expected = f"in {target.model} it is {info.shape}; mergekit merges every tensor, and needs equal shapes"
            raise VariantError(f"{other.model}: {name} {found}, {expected}.")


def _dtypes(target: Checkpoint, *others: Checkpoint) -> Mapping[str, str]:
    """What mergekit computes in, float32 or wider, and the one dtype that it writes."""
    stored = {info.dtype for info in target.tensors.values()} & FLOATS
    if len(stored) != 1:
        raise VariantError(f"{target.model}: has tensors in {sorted(stored)}, and mergekit writes one dtype. Export a checkpoint.")
    wide = any(info.dtype == "F64" for model in (target, *others) for info in model.tensors.values())
    return {"dtype": "float64" if wide else "float32", "out_dtype": str(DTYPES[stored.pop()]).removeprefix("torch.")}


def _place(model: Checkpoint) -> tuple[str, str | None]:
    return (model.model, model.revision) if model.folder is None else (str(model.folder.resolve()), None)


def _reference(model: Checkpoint) -> str | Config:
    """A folder or hub id as mergekit reads it. In a plain string `+` would stand before a LoRA and `@` before a revision."""
    path, revision = _place(model)
    if revision is None and not {"+", "@"} & set(path):
        return path
    return {"model": {"path": path, "revision": revision}}
