"""The module catalogue: every linear map inside the decoder layers of a checkpoint, read without its weights.

The module tree comes from `transformers` itself, built on the meta device from the config; names on disk, shapes and dtypes come
from the safetensors headers.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from transplant_ray.errors import CheckpointError, RecipeError
from transplant_ray.models.checkpoint import CONFIG_ERRORS, Checkpoint
from transplant_ray.models.families import FAMILIES, Family, Role, guess_role
from transplant_ray.models.header import FLOATS, TensorInfo, brief


@dataclass(frozen=True)
class Module:
    """One linear map inside a layer."""

    name: str
    """Canonical name: that of the loaded model, e.g. `model.layers.17.mlp.down_proj`."""
    layer: int
    path: str
    """Name inside its layer, e.g. `mlp.down_proj`."""
    role: Role
    shape: tuple[int, ...]
    """Shape of the weight as stored: (out, in), or (in, out) where `transposed`."""
    transposed: bool
    """GPT-2's `Conv1D`."""
    dtype: str
    """On disk, in safetensors' words."""
    disk_weight: str
    disk_bias: str | None

    @property
    def num_channels(self) -> int:
        """Output channels."""
        return self.shape[1 if self.transposed else 0]

    @property
    def num_parameters(self) -> int:
        return self.shape[0] * self.shape[1] + (self.num_channels if self.disk_bias else 0)


@dataclass(frozen=True)
class Exclusion:
    name: str
    reason: str


@dataclass(frozen=True)
class Catalogue:
    family: str
    guessed: bool
    """True where the family is unknown and roles were read from names."""
    num_layers: int
    modules: Mapping[str, Module]
    excluded: tuple[Exclusion, ...]


def read_catalogue(checkpoint: Checkpoint) -> Catalogue:
    """Catalogue of a checkpoint, in order of layers. CheckpointError where it has no decoder layers."""
    model = skeleton(checkpoint)
    known = FAMILIES.get(checkpoint.config.model_type)
    family = known or _generic_family(checkpoint, model)
    modules: dict[str, Module] = {}
    excluded: list[Exclusion] = []
    for entry in _entries(model, family, checkpoint.tensors):
        if isinstance(entry, Module):
            modules[entry.name] = entry
        else:
            excluded.append(entry)
    if not modules:
        raise CheckpointError(f"{checkpoint.model}: no linear maps found under `{family.layers}`. Is it a decoder?")
    num_layers = len(list(model.get_submodule(family.layers).children()))
    return Catalogue(checkpoint.config.model_type, known is None, num_layers, modules, tuple(excluded))


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model with its parameters on the meta device: all structure, no memory."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=checkpoint.remote_code)
            return model
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.model}: transformers cannot build a causal language model from its config ({brief(error)}). "
            "Expected a decoder."
        ) from error


def select_kind(modules: Iterable[Module], kind: str, where: str = "sweep.kind") -> tuple[Module, ...]:
    """Modules of a kind: `attn`, `ffn`, `all`, a projection (`down_proj`) or a path in the layer (`mlp.c_proj`).

    RecipeError, with the nearest names, where nothing matches; `where` is the key of the recipe that says the kind.
    """
    modules = tuple(modules)
    if chosen := tuple(module for module in modules if _is_kind(module, kind)):
        return chosen
    names = ["attn", "ffn", "all", *sorted({module.path.rpartition(".")[2] for module in modules})]
    near = difflib.get_close_matches(kind, names, n=2) or names
    raise RecipeError(f"`{where}`: {kind!r} matches no compatible module. Nearest: {', '.join(near)}.")


def _is_kind(module: Module, kind: str) -> bool:
    return kind in ("all", module.role.kind, module.path) or module.path.endswith(f".{kind}")


def _generic_family(checkpoint: Checkpoint, model: nn.Module) -> Family:
    """The longest list of equal children is taken for the layers; roles are guessed from the words of the names."""
    lists = [
        (len(child), name)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) and not any(sense in name for sense in ("vision", "visual", "audio"))
    ]
    if not lists:
        raise CheckpointError(f"{checkpoint.model}: {checkpoint.config.model_type} has no list of layers. Is it a decoder?")
    layers = max(lists, key=lambda item: (item[0], -len(item[1])))[1]
    roles = {path: role for path, _ in _linear_maps(model.get_submodule(f"{layers}.0")) if (role := guess_role(path))}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return Family(layers, roles, disk=(layers, layers.removeprefix(prefix)))


def _linear_maps(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in root.named_modules() if isinstance(child, nn.Linear | Conv1D))


def _entries(model: nn.Module, family: Family, tensors: Mapping[str, TensorInfo]) -> Iterator[Module | Exclusion]:
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        covered = set()
        for path, linear in _linear_maps(layer):
            covered |= {f"{path}.weight", f"{path}.bias"}
            yield _entry(linear, family, index, path, tensors, tied=users[id(linear.weight)] > 1)
        for path, parameter in layer.named_parameters():
            if path not in covered and parameter.dim() > 1:
                yield Exclusion(f"{family.layers}.{index}.{path}", f"not a linear map: {tuple(parameter.shape)}")


def _entry(
    linear: nn.Module, family: Family, layer: int, path: str, tensors: Mapping[str, TensorInfo], *, tied: bool
) -> Module | Exclusion:
    name = f"{family.layers}.{layer}.{path}"
    role = family.roles.get(path) or guess_role(path)
    if role is None:
        return Exclusion(name, "neither attention nor feed-forward by its name")
    if tied:
        return Exclusion(name, "tied: its weight is used in more than one place")
    prefix = next((disk for disk in family.disk if f"{disk}.{layer}.{path}.weight" in tensors), None)
    if prefix is None:
        return Exclusion(name, "missing: its weight is not in the checkpoint under any known name")
    disk = f"{prefix}.{layer}.{path}"
    for what, parameter in linear.named_parameters(recurse=False):
        if reason := _misfit(what, parameter, tensors.get(f"{disk}.{what}")):
            return Exclusion(name, reason)
    info = tensors[f"{disk}.weight"]
    bias = f"{disk}.bias" if linear.bias is not None else None
    return Module(name, layer, path, role, info.shape, isinstance(linear, Conv1D), info.dtype, f"{disk}.weight", bias)


def _misfit(what: str, parameter: nn.Parameter, stored: TensorInfo | None) -> str | None:
    """Why a stored weight or bias cannot be copied, None where it can."""
    if stored is None:
        return f"missing: its {what} is not in the checkpoint"
    if stored.dtype not in FLOATS:
        return f"quantised: {what} stored as {stored.dtype}"
    if stored.shape != tuple(parameter.shape):
        return f"{what} stored as {stored.shape}, the config says {tuple(parameter.shape)}"
    return None
