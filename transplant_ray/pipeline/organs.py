"""`organ extract`, `organ insert` and `organ remove`: layers out of a model, into another, and out of it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transplant_ray.errors import OrganError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import MODES, Insertion, Placement, plan_insertion
from transplant_ray.organ.remove import remove_organs
from transplant_ray.organ.vocabulary import CHOICES


def extract(model: str, layers: str, out: str | Path, *, revision: str | None = None, licence: str | None = None) -> Organ:
    """Cut contiguous layers out of `model` and write them as an organ folder.

    `layers` counts from 0 and takes both ends: `4-6`, `4`, or `default`, three layers from a third of the depth on.
    """
    return open_organ(extract_organ(open_checkpoint(model, revision), layers, Path(out), licence))


def insert(
    recipient: str,
    organs: Sequence[tuple[str | Path, int]],
    out: str | Path,
    *,
    mode: str = "insert",
    vocabulary: str = "refuse",
    revision: str | None = None,
) -> Insertion:
    """Put organs, each with its position, into `recipient` and write what comes of it as a checkpoint folder.

    A position is a layer of the recipient as it is before, counted from 0: an organ is put before it, or with mode `replace` takes
    its place and that of those after it.
    """
    if mode not in MODES:
        raise OrganError(f"mode {mode!r}: expected one of {', '.join(MODES)}.")
    if vocabulary not in CHOICES:
        raise OrganError(f"vocabulary {vocabulary!r}: expected one of {', '.join(CHOICES)}.")
    if not organs:
        raise OrganError("no organ: give at least one, with its position.")
    opened = {folder: open_organ(Path(folder)) for folder, _ in organs}
    placements = [Placement(opened[folder], at) for folder, at in organs]
    insertion = plan_insertion(open_checkpoint(recipient, revision), placements, mode, vocabulary)
    write_insertion(insertion, Path(out))
    return insertion


def remove(model: str | Path, out: str | Path) -> Path:
    """Take out what `insert` has put into the folder `model`: writes the recipient as it was, byte for byte."""
    return remove_organs(Path(model), Path(out))


def describe(organ: str | Path) -> dict[str, str]:
    """What an organ is, in a few words each, once it has been held against its hashes."""
    opened = open_organ(Path(organ))
    manifest, config = opened.manifest, opened.checkpoint.config
    source = manifest.source
    kinds = ", ".join(kind for kind in opened.types if kind is not None)
    return {
        "organ": manifest.id,
        "cut out of": f"{source.model}{f', revision {source.revision}' if source.revision else ''}",
        "layers": f"{manifest.layers} of {source.num_layers}, counted from 0{f': {kinds}' if kinds else ''}",
        "family": manifest.family,
        "width": f"{config.hidden_size}, {config.num_attention_heads} heads",
        "vocabulary": f"{manifest.vocabulary.size} tokens",
        "parameters": f"{opened.checkpoint.num_parameters:,}",
        "training": "none" if manifest.training is None else "see `training` in organ.json",
        "licence": manifest.licence or "not said",
    }
