"""Cut contiguous layers out of a checkpoint, reading nothing else of its weights."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from transplant_ray.errors import OrganError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.loading import load_tensors
from transplant_ray.organ.card import said_licence
from transplant_ray.organ.folder import write_organ
from transplant_ray.organ.manifest import Source
from transplant_ray.organ.settings import layer_types, with_layers
from transplant_ray.organ.stack import read_stack
from transplant_ray.organ.vocabulary import read_vocabulary

DEFAULT_LAYERS = 3
"""arXiv:2601.13580 takes three, from a third of the depth on."""


def select_layers(text: str, num_layers: int) -> range:
    """`4-6`, both counted from 0 and both taken; `4`; or `default`, three layers from ⌊L/3⌋ on. OrganError where that cannot be."""
    if text == "default":
        first = num_layers // 3
        return range(first, min(first + DEFAULT_LAYERS, num_layers))
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    if found is None:
        raise OrganError(
            f"layers {text!r}: not a contiguous stretch. Give the first and the last, such as 4-6, or one, or `default`."
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < num_layers:
        raise OrganError(
            f"layers {text!r}: expected a stretch of 0-{num_layers - 1}, for layers are counted from 0 and there are {num_layers}."
        )
    return range(first, last + 1)


def extract_organ(checkpoint: Checkpoint, layers: str, out: Path, licence: str | None = None) -> Path:
    """Write the layers as an organ folder. OrganError where they are not there, CheckpointError where they cannot be moved."""
    stack = read_stack(checkpoint)
    chosen = select_layers(layers, len(stack.layers))
    names = {
        f"{stack.home}.{place}.{path}": stack.name(layer, path)
        for place, layer in enumerate(chosen)
        for path in stack.layers[layer]
    }
    folder = checkpoint.fetch({checkpoint.tensors[name].file for name in names.values()})
    here = replace(checkpoint, folder=folder)
    types = layer_types(checkpoint.config)
    return write_organ(
        out,
        {ours: checkpoint.tensors[name] for ours, name in names.items()},
        {ours: partial(_load, here, name) for ours, name in names.items()},
        config=with_layers(checkpoint.config, [types[layer] for layer in chosen]),
        source=Source(model=checkpoint.model, revision=checkpoint.revision, first=chosen.start, num_layers=len(types)),
        vocabulary=read_vocabulary(checkpoint),
        licence=licence or said_licence(folder),
        licences=folder,
    )


def _load(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return load_tensors(checkpoint, [name])[name]
