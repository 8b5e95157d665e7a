"""A variant as files: a checkpoint that loads anywhere, and a delta that turns the target into it and back.

    checkpoint/  the target's files with the changed tensors replaced, README.md (the card), variant.json
    delta/       delta.safetensors (the changed tensors), undo.safetensors (what they replace), delta.json, README.md, variant.json

Both appear whole or not at all. No model is loaded: tensors are read, blended and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transplant_ray.errors import CheckpointError
from transplant_ray.files import sha256_file, whole_folder, write_json, write_text
from transplant_ray.graft.variant import Coefficient, Variant, blend, check_variant
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.compare import Comparison
from transplant_ray.models.header import read_header
from transplant_ray.models.loading import load_tensors
from transplant_ray.models.writing import MakeTensor, write_checkpoint, write_safetensors

FORMAT = 1
DELTA, UNDO, MANIFEST = "delta.safetensors", "undo.safetensors", "delta.json"
TOLD = ("README.md", "variant.json")
"""What an exported checkpoint and its delta tell of the variant, beside the weights."""


def export_checkpoint(comparison: Comparison, variant: Variant, out: Path, card: str, *, replace: bool = False) -> Path:
    """Write the variant as a checkpoint folder. RunError where `out` exists and `replace` is off."""
    make = changed_tensors(comparison, variant)
    with whole_folder(out, replace=replace) as folder:
        write_checkpoint(comparison.target, make, folder)
        write_text(folder / "README.md", card)
        write_json(folder / "variant.json", describe_variant(comparison, variant))
    return out


def export_delta(comparison: Comparison, variant: Variant, checkpoint: Path, out: Path, *, replace: bool = False) -> Path:
    """Write the delta between the target and its exported `checkpoint`."""
    target = comparison.target
    make = changed_tensors(comparison, variant)
    with whole_folder(out, replace=replace) as folder:
        write_safetensors(folder / DELTA, target.tensors, make)
        write_safetensors(folder / UNDO, target.tensors, {name: _stored(target, name) for name in make})
        manifest = {
            "format": FORMAT,
            "target": {
                "model": target.model,
                "revision": target.revision,
                "files": file_hashes(target.fetch(), target),
            },
            "result": {"files": file_hashes(checkpoint, target)},
            "delta": {name: sha256_file(folder / name) for name in (DELTA, UNDO)},
        }
        write_json(folder / MANIFEST, manifest)
        for name in TOLD:
            shutil.copyfile(checkpoint / name, folder / name)
    return out


def apply_delta(delta: Path, target: str, out: Path, *, undo: bool = False, revision: str | None = None) -> Path:
    """Turn `target` into the variant that `delta` describes, or with `undo` turn that variant back into the target.

    CheckpointError where the delta is damaged, or `target` is not, byte for byte, the checkpoint it was made for.
    """
    manifest = _read_manifest(delta)
    changes = delta / (UNDO if undo else DELTA)
    _check_hash(changes, manifest["delta"].get(changes.name))
    base = open_checkpoint(target, revision)
    before, after = (manifest["result"], manifest["target"]) if undo else (manifest["target"], manifest["result"])
    _check_same_files(base, before["files"], undo=undo)
    tensors = read_header(changes)
    if strangers := sorted(tensors.keys() - base.tensors.keys()):
        raise CheckpointError(f"{changes}: {strangers[0]} is not in the target. Make the delta again.")
    patch = Checkpoint(str(changes), None, delta, base.config, tensors)
    with whole_folder(out) as folder:
        write_checkpoint(base, {name: _stored(patch, name) for name in tensors}, folder)
        if file_hashes(folder, base) != after["files"]:
            raise CheckpointError(f"{delta}: the result is not what the delta promises. Make the delta again.")
        for name in TOLD:  # they tell of the variant: the target has none of them
            if undo:
                (folder / name).unlink(missing_ok=True)
            else:
                shutil.copyfile(delta / name, folder / name)
    return out


def changed_tensors(comparison: Comparison, variant: Variant) -> dict[str, MakeTensor]:
    """For every tensor that the variant changes, by its name in the target's files, how to make it."""
    check_variant(variant, {name: pair.target for name, pair in comparison.pairs.items()})
    make: dict[str, MakeTensor] = {}
    for name, coefficient in variant.coefficients.items():
        pair = comparison.pairs[name]
        for ours, theirs in (
            (pair.target.disk_weight, pair.source.disk_weight),
            (pair.target.disk_bias, pair.source.disk_bias),
        ):
            if ours and theirs:
                make[ours] = _blended(comparison, ours, theirs, coefficient, pair.target.transposed)
    return make


def describe_variant(comparison: Comparison, variant: Variant) -> dict[str, Any]:
    """`variant.json`: all that is needed to make the checkpoint again."""
    models = {
        role: {"model": checkpoint.model, "revision": checkpoint.revision}
        for role, checkpoint in (("source", comparison.source), ("target", comparison.target))
    }
    return {"format": FORMAT, "id": variant.id, **models, "coefficients": variant.to_json()}


def file_hashes(folder: Path, layout: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file."""
    return {file: sha256_file(folder / file) for file in layout.weight_files()}


def _blended(comparison: Comparison, ours: str, theirs: str, coefficient: Coefficient, transposed: bool) -> MakeTensor:
    def make() -> torch.Tensor:
        target = load_tensors(comparison.target, [ours])[ours]
        source = load_tensors(comparison.source, [theirs])[theirs]
        return blend(target, source, coefficient, transposed=transposed)

    return make


def _stored(checkpoint: Checkpoint, name: str) -> MakeTensor:
    return lambda: load_tensors(checkpoint, [name])[name]


def _read_manifest(delta: Path) -> dict[str, Any]:
    path = delta / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        hashes = [manifest["target"]["files"], manifest["result"]["files"], manifest["delta"]]
        if not all(isinstance(part, dict) for part in hashes):
            raise TypeError("its hashes are not by file")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the manifest of a delta ({error}). Expected a folder that `export` wrote.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, expected {FORMAT}. Use the version that wrote it.")
    if lost := [name for name in TOLD if not (delta / name).is_file()]:
        raise CheckpointError(f"{delta}: {lost[0]} is missing. Copy the delta again.")
    return manifest


def _check_hash(path: Path, expected: str | None) -> None:
    if not path.exists() or sha256_file(path) != expected:
        raise CheckpointError(f"{path}: missing or damaged (its SHA-256 is not that of delta.json). Copy the delta again.")


def _check_same_files(base: Checkpoint, expected: Mapping[str, str], *, undo: bool) -> None:
    found = file_hashes(base.fetch(), base)
    if found != expected:
        differing = sorted(file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file))
        wanted = "the checkpoint that this delta makes" if undo else "the target that this delta was made for"
        raise CheckpointError(f"{base.model}: {differing[0]} differs from {wanted}. Nothing was written.")
