"""Full-size checkpoints that take no disk: the true config, true safetensors headers, and holes where the weights would be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Shapes = Mapping[str, tuple[int, ...]]


def sparse_checkpoint(folder: Path, config: PretrainedConfig, dtype: str = "BF16", shard_bytes: int | None = None) -> Path:
    """The folder that `save_pretrained` would write for this config, sharded above `shard_bytes`; every weight reads as zero.

    It has no tokenizer: `tiny_tokenizer().save_pretrained(folder)` adds one.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_TORCH[dtype])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    shards = list(_shards(stored_shapes(model), _TORCH[dtype].itemsize, shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if shard_bytes is None:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, shapes in zip(names, shards, strict=True):
        _write_sparse(folder / name, shapes, dtype)
    return folder


def stored_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint of this model holds: the state dict, tied tensors once."""
    parameters = dict(model.named_parameters())  # each tied tensor under its first name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _shards(shapes: Shapes, itemsize: int, shard_bytes: int | None) -> Iterator[Shapes]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * itemsize
        if shard and shard_bytes is not None and size + num_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += num_bytes
    yield shard


def _write_sparse(path: Path, shapes: Shapes, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * _TORCH[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
