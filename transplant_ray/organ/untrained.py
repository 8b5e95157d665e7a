"""The layers of a trained organ as they were before: cut out of its source again, and held against what the organ says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transplant_ray.errors import CheckpointError, OrganError
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.header import brief
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ

OWN = "it was not trained, so it is its own control"


def find_untrained(organ: Organ, recipient: Checkpoint, folder: Path) -> Organ | str:
    """The organ's layers before it was trained, written below `folder`; or why nobody has them.

    The recipient is asked first, for a path may be another today, and then the model that the organ names. Either counts only where
    the layers give the very fingerprint from which the organ was trained: nobody's word is taken for it.
    """
    before = _first_fingerprint(organ.manifest.training)
    if organ.manifest.training is None:
        return OWN
    if before is None:
        return "organ.json does not say from which layers it was trained"
    source = organ.manifest.source
    candidates, reasons = [recipient], [f"layers {organ.manifest.layers} of {recipient.model} are others"]
    if source.model != recipient.model:
        found = _open(source.model, source.revision)
        if isinstance(found, Checkpoint):
            candidates.append(found)
            reasons.append(f"layers {organ.manifest.layers} of {source.model} are not those of before, or were changed since")
        else:
            reasons.append(f"its source {source.model} cannot be opened ({found})")
    return _cut_out(organ, candidates, before, folder) or "; ".join(reasons)


def _cut_out(organ: Organ, candidates: Sequence[Checkpoint], before: str, folder: Path) -> Organ | None:
    manifest = organ.manifest
    for number, checkpoint in enumerate(candidates):
        try:
            found = open_organ(extract_organ(checkpoint, manifest.layers, folder / f"{number}"))
        except (OrganError, CheckpointError):  # it has no such layers
            continue
        said = found.manifest.model_copy(update={"source": manifest.source, "licence": manifest.licence})
        if said.fingerprint == before:
            return found
    return None


def _first_fingerprint(training: dict[str, Any] | None) -> str | None:
    """Of the layers as they were cut out: an organ that was trained more than once says all of it."""
    while training is not None and isinstance(training.get("earlier"), dict):
        training = training["earlier"]
    before = None if training is None else training.get("before")
    return before if isinstance(before, str) else None


def _open(model: str, revision: str | None) -> Checkpoint | str:
    try:
        return open_checkpoint(model, revision)
    except CheckpointError as error:
        return brief(error)
