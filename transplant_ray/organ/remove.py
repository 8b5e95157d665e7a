"""Take organs out again: the recipient as it was, byte for byte, from the model that they were put into and what it kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from transplant_ray.errors import OrganError
from transplant_ray.files import sha256_file, whole_folder
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.header import TensorInfo, parse_header, read_header
from transplant_ray.models.writing import stored_pieces, write_parts
from transplant_ray.organ.record import REPLACED, UNDO, Record, read_record

Stored = Mapping[str, tuple[Path, TensorInfo]]
"""Where tensors lie, by their names."""


def remove_organs(model: Path, out: Path) -> Path:
    """Write the recipient of a folder that `write_insertion` wrote.

    OrganError where a file would not be what it was, for it was changed since; RunError where `out` exists or there is no room.
    Either way nothing is left behind.
    """
    record = read_record(model)
    stored = _read_headers(model)
    with whole_folder(out) as folder:
        for file, digest in record.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _restore(file, model, folder / file, record, stored)
            if sha256_file(folder / file) != digest:
                raise OrganError(
                    f"{model}: {file} would not be what the recipient had, for it was changed since the organ was put in. "
                    f"Take {record.recipient} itself; nothing was written."
                )
    return out


def _read_headers(model: Path) -> Stored:
    files = [model / file for file in open_checkpoint(str(model)).weight_files()]
    return {name: (path, info) for path in files for name, info in read_header(path).items()}


def _restore(file: str, model: Path, path: Path, record: Record, stored: Stored) -> None:
    kept, header = model / UNDO / file, model / UNDO / f"{file}.json"
    if header.is_file():
        text = header.read_bytes()
        names = sorted(parse_header(path, text).items(), key=lambda item: (item[1].start, item[1].num_bytes))
        replaced = _replaced(model / UNDO / REPLACED)
        write_parts(path, text, (_pieces(model, name, record, stored, replaced) for name, _ in names))
        return
    source = kept if kept.is_file() else model / file
    if not source.is_file():
        raise OrganError(f"{model}: {file} is missing. Copy the model again, with the folder `{UNDO}`.")
    shutil.copyfile(source, path)


def _replaced(path: Path) -> Stored:
    return {name: (path, info) for name, info in read_header(path).items()} if path.is_file() else {}


def _pieces(model: Path, name: str, record: Record, stored: Stored, replaced: Stored) -> Iterator[bytes]:
    new_name = record.new_name(name)
    found = replaced.get(name) if new_name is None else stored.get(new_name)
    if found is None:
        raise OrganError(f"{model}: {new_name or name} is missing. Copy the model again, with the folder `{UNDO}`.")
    return stored_pieces(*found)
