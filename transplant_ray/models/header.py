"""The header of a safetensors file: what it holds and where, checked against the file itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from transplant_ray.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""

MAX_DIMENSIONS = 64
"""torch has no tensors with more."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes of tensors that are not quantised, by their name in a safetensors header."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte of the tensor in its file; -1 for a hub checkpoint, whose files are not here."""
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file. CheckpointError where header and file disagree (truncated, corrupt)."""
    text, size = header_text(path)
    tensors = parse_header(path, text)
    _check_extents(path, 8 + len(text), size, tensors)
    return tensors


def parse_header(path: Path, text: bytes) -> dict[str, TensorInfo]:
    """Tensors of the file at `path` by its header alone; the file need not be there."""
    origin = 8 + len(text)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _tensor_info(path.name, origin, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is corrupt ({brief(error)}). Download it again.") from error


def header_text(path: Path) -> tuple[bytes, int]:
    """The header as it is written, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length <= MAX_HEADER_BYTES and 8 + length <= size:
                return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the disk and the rights.") from error
    raise CheckpointError(f"{path}: truncated or not safetensors ({size} bytes, header of {length}). Download it again.")


def _check_extents(path: Path, end: int, size: int, tensors: Mapping[str, TensorInfo]) -> None:
    """The tensors must fill the file from `end`, the end of the header, to `size`: the format forbids holes and overlaps."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            found = f"{name} starts at byte {info.start}, what comes before it ends at {end}"
            raise CheckpointError(f"{path}: the safetensors header is corrupt ({found}). Download it again.")
        end += info.num_bytes
    if end != size:
        raise CheckpointError(f"{path}: truncated or corrupt: {size} bytes, the header promises {end}. Download it again.")


def _tensor_info(file: str, origin: int, entry: Mapping[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    whole = all(type(number) is int and 0 <= number < 2**63 for number in (start, end, *shape))  # bool is an int too
    if not whole or end < start or not isinstance(dtype, str):
        raise ValueError(f"{dtype!r} with offsets {start!r}–{end!r} and shape {shape!r}")
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"{dtype} {shape} does not fill {end - start} bytes")
    return TensorInfo(file, dtype, shape, origin + start, end - start)


def brief(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
