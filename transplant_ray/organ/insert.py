"""Write a recipient with organs as an ordinary checkpoint, with all that is needed to take them out again.

    config.json, shards, index   the recipient's, its layers numbered anew; files keep their names, and tensors their order
    insertion.json               which layer comes from where, and the hash of every file of the recipient
    undo/                        the recipient's files that were changed: of weight files the headers, and layers that were replaced
    README.md                    the card
    LICENSE.organ-ID, …          licence files that came with an organ, beside the recipient's own

Tensors of the recipient are copied as bytes. A tensor of an organ takes the dtype that the recipient's layers have; it lies where
the one that it replaces lay, or at the end of the file with the layer before which it was put. No model is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from transplant_ray.files import whole_folder, write_json, write_text
from transplant_ray.models.checkpoint import CARD, INDEX, SINGLE, Checkpoint
from transplant_ray.models.header import DTYPES, TensorInfo, header_text, read_header
from transplant_ray.models.loading import load_tensors
from transplant_ray.models.writing import copy_companions, make_header, stored_pieces, tensor_bytes, write_parts
from transplant_ray.organ.card import insertion_card
from transplant_ray.organ.folder import licence_files
from transplant_ray.organ.insertion import Insertion
from transplant_ray.organ.record import RECORD, REPLACED, UNDO, Record, make_record
from transplant_ray.organ.settings import COUNT

CONFIG = "config.json"


@dataclass(frozen=True)
class Part:
    """A tensor of a file that is to be written."""

    name: str
    info: TensorInfo
    """Dtype, shape and size to be written; of a tensor of the recipient also where it lies."""
    origin: Checkpoint | None = None
    """The organ that it comes from; None for the recipient."""
    stored: str = ""
    """Its name there."""

    def pieces(self, folder: Path) -> Iterable[bytes | memoryview]:
        """Its bytes; `folder` is the recipient's."""
        if self.origin is None:
            return stored_pieces(folder / self.info.file, self.info)
        return [tensor_bytes(load_tensors(self.origin, [self.stored], DTYPES[self.info.dtype])[self.stored])]


def write_insertion(insertion: Insertion, out: Path, *, replace_old: bool = False) -> Path:
    """Write the new model. RunError where `out` exists or there is no room, and then nothing is left behind."""
    recipient = insertion.recipient
    source = recipient.fetch()
    with whole_folder(out, replace=replace_old) as folder:
        record = make_record(insertion)
        copy_companions(recipient, folder)
        _keep_changed_files(source, folder / UNDO)
        files = _lay_out(insertion, record, source)
        for file, parts in files.items():
            write_parts(folder / file, _header(source / file, parts), (part.pieces(source) for part in parts))
        _keep_headers_and_layers(record, source, files, folder / UNDO)
        _write_config(insertion, source, folder)
        if recipient.weight_files() != (SINGLE,):
            _write_index(insertion, record, files, folder)
        write_json(folder / RECORD, record.model_dump())
        write_text(folder / CARD, _card(insertion, record.licence, _add_licences(insertion, folder)))
    return out


def _keep_changed_files(source: Path, undo: Path) -> None:
    undo.mkdir()
    for name in (CONFIG, INDEX, CARD, RECORD):
        if (source / name).is_file():
            shutil.copyfile(source / name, undo / name)
    if (source / RECORD).is_file() and (source / UNDO).is_dir():
        shutil.copytree(source / UNDO, undo / UNDO)


def _lay_out(insertion: Insertion, record: Record, source: Path) -> dict[str, list[Part]]:
    """Every weight file of the new model with its tensors in order."""
    put = {name: (origin, stored) for name, origin, stored in insertion.tensors() if origin is not insertion.recipient}
    files: dict[str, list[Part]] = {}
    for file in insertion.recipient.weight_files():
        files[file] = []
        for name, info in _in_order(read_header(source / file)):
            if new_name := record.new_name(name):
                files[file].append(Part(new_name, info))
            elif name in put:  # an organ's layer has the number of the one that it replaces
                files[file].append(Part(name, info, *put.pop(name)))
    for name, (origin, stored) in put.items():
        like = _neighbour(insertion, name)
        shape = origin.tensors[stored].shape
        info = replace(like, shape=shape, start=-1, num_bytes=prod(shape) * DTYPES[like.dtype].itemsize)
        files[like.file].append(Part(name, info, origin, stored))
    return files


def stored_dtype(insertion: Insertion, name: str) -> str:
    """In which the new model's file holds a tensor of an organ: that of the one which it replaces, or of its neighbour."""
    recipient = insertion.recipient
    replaced = insertion.mode == "replace" and name in recipient.tensors
    return (recipient.tensors[name] if replaced else _neighbour(insertion, name)).dtype


def _neighbour(insertion: Insertion, name: str) -> TensorInfo:
    """Of a tensor that is put in: its like in the recipient's layer before which it comes, or the last one."""
    _, place, path = name.removeprefix(insertion.stack.prefix).split(".", 2)
    after = [layer.index for layer in insertion.layers[int(place) :] if layer.organ is None] or [len(insertion.stack.layers) - 1]
    return insertion.recipient.tensors[insertion.stack.name(after[0], path)]


def _in_order(header: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    return sorted(header.items(), key=lambda item: (item[1].start, item[1].num_bytes))


def _header(path: Path, parts: Iterable[Part]) -> bytes:
    """The header for `parts`; where the file at `path` has those already, its own to the byte."""
    text, _ = header_text(path)
    layout = {part.name: part.info for part in parts}
    before = [(name, info.dtype, info.shape) for name, info in _in_order(read_header(path))]
    if before == [(name, info.dtype, info.shape) for name, info in layout.items()]:
        return text
    return make_header(layout, json.loads(text).get("__metadata__"))


def _keep_headers_and_layers(record: Record, source: Path, files: Iterable[str], undo: Path) -> None:
    replaced: dict[str, TensorInfo] = {}
    for file in files:
        (undo / f"{file}.json").write_bytes(header_text(source / file)[0])
        replaced |= {name: info for name, info in _in_order(read_header(source / file)) if record.new_name(name) is None}
    if replaced:
        pieces = (stored_pieces(source / info.file, info) for info in replaced.values())
        write_parts(undo / REPLACED, make_header(replaced, {"format": "pt"}), pieces)


def _write_config(insertion: Insertion, source: Path, folder: Path) -> None:
    said: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    settings = dict(insertion.settings)
    if COUNT in said:  # some families also read this under the name that is common to all
        settings |= {COUNT: len(insertion.layers)}
    _rewrite(folder / CONFIG, said, {**said, **settings})


def _write_index(insertion: Insertion, record: Record, files: Mapping[str, list[Part]], folder: Path) -> None:
    said: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    kept = {new_name: file for name, file in said["weight_map"].items() if (new_name := record.new_name(name))}
    put = {part.name: (file, part.info) for file, parts in files.items() for part in parts if part.origin is not None}
    gone = [info for name, info in insertion.recipient.tensors.items() if record.new_name(name) is None]
    metadata = dict(said["metadata"])
    for key, size in (("total_size", _num_bytes), ("total_parameters", _num_parameters)):
        if type(metadata.get(key)) is int:
            metadata[key] += sum(size(info) for _, info in put.values()) - sum(map(size, gone))
    weight_map = dict(sorted({**kept, **{name: file for name, (file, _) in put.items()}}.items()))
    _rewrite(folder / INDEX, said, {**said, "metadata": metadata, "weight_map": weight_map})


def _num_bytes(info: TensorInfo) -> int:
    return info.num_bytes


def _num_parameters(info: TensorInfo) -> int:
    return prod(info.shape)


def _rewrite(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Where nothing has changed the file stays as it is, to the byte."""
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_licences(insertion: Insertion, folder: Path) -> list[str]:
    """Licence files of the organs, under names of their own, so that the recipient's stay as they are. Returns the names."""
    organs = {placement.organ.manifest.id: placement.organ for placement in insertion.placements}
    names = {f"{path.name}.organ-{id}": path for id, organ in organs.items() for path in licence_files(organ.checkpoint.fetch())}
    for name, path in names.items():
        if not (folder / name).exists():  # the recipient has the same organ already, and gets its file back as it was
            shutil.copyfile(path, folder / name)
    return list(names)


def _card(insertion: Insertion, licence: str | None, licences: list[str]) -> str:
    recipient = insertion.recipient
    organs = [(placement.at, placement.organ.manifest) for placement in insertion.placements]
    origins = [
        f"layer {layer.index} of " + ("the recipient" if layer.organ is None else f"organ `{organs[layer.organ][1].id}`")
        for layer in insertion.layers
    ]
    return insertion_card(
        recipient.model, recipient.revision, licence, organs, insertion.mode, origins, insertion.warnings, licences
    )
