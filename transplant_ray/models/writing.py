"""Write a changed copy of a checkpoint: same files, same names, same layout; unchanged tensors byte for byte.

A replaced tensor has the dtype and shape of the one it replaces, so its bytes have the same place in the file: each file is
copied by the operating system and the changed ranges are written over it. No model is in memory, only one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from transplant_ray.errors import CheckpointError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.convert import COMPANIONS
from transplant_ray.models.header import DTYPES, TensorInfo, read_header

MakeTensor = Callable[[], torch.Tensor]
PIECE_BYTES = 1 << 24
"""Of a tensor that is only copied, so much is in memory."""


def write_checkpoint(base: Checkpoint, replaced: Mapping[str, MakeTensor], out: Path) -> None:
    """Copy `base` into the folder `out` with the tensors named in `replaced` (by their names on disk) made anew."""
    copy_companions(base, out)
    folder = base.fetch()
    for file in base.weight_files():
        shutil.copyfile(folder / file, out / file)
        layout = read_header(out / file)  # where a hub checkpoint's tensors are, only the file itself says
        for name, make in replaced.items():
            if base.tensors[name].file == file:
                overwrite_tensor(out / file, name, layout[name], make())


def copy_companions(base: Checkpoint, out: Path) -> None:
    patterns = (*COMPANIONS, "*.py") if base.remote_code else COMPANIONS
    for pattern in patterns:
        for path in base.fetch().glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


def overwrite_tensor(path: Path, name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
    """Write a tensor over the bytes of another of the same dtype and shape."""
    content = _fitting_bytes(name, info, tensor)
    with path.open("r+b") as file:
        file.seek(info.start)
        file.write(content)


def _fitting_bytes(name: str, info: TensorInfo, tensor: torch.Tensor) -> memoryview:
    if tuple(tensor.shape) != info.shape or tensor.dtype != DTYPES[info.dtype]:
        raise CheckpointError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} cannot replace {info.dtype} {info.shape}.")
    return tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them: row-major, little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(path: Path, layout: Mapping[str, TensorInfo], make: Mapping[str, MakeTensor]) -> None:
    """A safetensors file with the tensors of `make`, each with the dtype and shape of its namesake in `layout`.

    One tensor is in memory at a time, which the library's own writer does not offer.
    """
    header = make_header({name: layout[name] for name in make}, {"format": "pt"})
    write_parts(path, header, ([_fitting_bytes(name, layout[name], make_tensor())] for name, make_tensor in make.items()))


def make_header(layout: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file that holds these tensors one after another."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, info in layout.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, offset + info.num_bytes]}
        offset += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes


def write_parts(path: Path, header: bytes, parts: Iterable[Iterable[bytes | memoryview]]) -> None:
    """A safetensors file of a header and, in its order, the bytes of every tensor in one or more pieces."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            for piece in part:
                file.write(piece)


def stored_pieces(path: Path, info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor as they lie in its file, whatever its dtype."""
    try:
        with path.open("rb") as file:
            file.seek(info.start)
            for start in range(0, info.num_bytes, PIECE_BYTES):
                length = min(PIECE_BYTES, info.num_bytes - start)
                piece = file.read(length)
                if len(piece) != length:
                    raise CheckpointError(f"{path}: became shorter while it was read. Leave it alone and try again.")
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the disk and the rights.") from error
