"""The layers of a checkpoint as tensors on disk: which belong to which layer, held against what the loaded model has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transplant_ray.errors import CheckpointError
from transplant_ray.models.catalogue import skeleton
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.families import FAMILIES
from transplant_ray.models.header import FLOATS, TensorInfo


@dataclass(frozen=True)
class Stack:
    """The layers of a checkpoint, in order."""

    home: str
    """Name of the list of layers in the loaded model, e.g. `model.layers`."""
    prefix: str
    """The same on disk: what a base class has saved has another."""
    layers: tuple[tuple[str, ...], ...]
    """Of every layer, the paths of its tensors, e.g. `mlp.up_proj.weight`."""

    def name(self, layer: int, path: str) -> str:
        """Name of a tensor on disk."""
        return f"{self.prefix}.{layer}.{path}"


def split_name(name: str, prefix: str) -> tuple[int, str] | None:
    """Layer and path of a tensor by its name on disk; None outside of the layers."""
    layer, _, path = name.removeprefix(f"{prefix}.").partition(".")
    inside = name.startswith(f"{prefix}.") and path and re.fullmatch("0|[1-9][0-9]{0,8}", layer)
    return (int(layer), path) if inside else None


def read_stack(checkpoint: Checkpoint) -> Stack:
    """The layers of a checkpoint, by config and headers. CheckpointError for an unlisted family, and tensors that do not fit."""
    family = FAMILIES.get(checkpoint.config.model_type)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.model}: layers of family {checkpoint.config.model_type} cannot be moved, for nobody has looked what "
            f"in them depends on their place. Expected one of {', '.join(sorted(FAMILIES))}."
        )
    layers = skeleton(checkpoint).get_submodule(family.layers)
    states = [layer.state_dict() for layer in layers.children()]
    shapes = [{path: tuple(tensor.shape) for path, tensor in state.items()} for state in states]
    prefix = next((disk for disk in family.disk if any(name.startswith(f"{disk}.0.") for name in checkpoint.tensors)), None)
    if prefix is None:
        raise CheckpointError(f"{checkpoint.model}: no tensor of a layer is there. Expected names such as `{family.layers}.0.…`.")
    stack = Stack(family.layers, prefix, tuple(tuple(state) for state in shapes))
    for layer, state in enumerate(shapes):
        for path, shape in state.items():
            _check(checkpoint, stack.name(layer, path), shape)
    if beyond := sorted(name for name in checkpoint.tensors if (split_name(name, prefix) or (0,))[0] >= len(shapes)):
        raise CheckpointError(f"{checkpoint.model}: {beyond[0]} is of a layer that the config does not have. Download it again.")
    return stack


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored: TensorInfo | None = checkpoint.tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{checkpoint.model}: {name} is missing. Download it again.")
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{checkpoint.model}: {name} is stored as {stored.dtype}, which is quantised. Use the full-precision checkpoint."
        )
    if stored.shape != shape:
        raise CheckpointError(f"{checkpoint.model}: {name} is {stored.shape}, the config says {shape}. Download it again.")
