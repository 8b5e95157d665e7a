"""`organ.json`: what an organ is, where it comes from, and hashes of all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from transplant_ray.errors import OrganError
from transplant_ray.models.header import brief
from transplant_ray.organ.vocabulary import Vocabulary

FORMAT: Literal[1] = 1
WEIGHTS, MANIFEST = "organ.safetensors", "organ.json"


class Source(BaseModel):
    """The model that an organ was cut out of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    revision: str | None
    first: int = Field(ge=0)
    """The first of its layers that were cut out, counted from 0."""
    num_layers: int = Field(ge=1)
    """How many layers it has."""


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    family: str
    num_layers: int = Field(ge=1)
    source: Source
    config: dict[str, Any]
    """The source's config for these layers alone, spelt out: widths, heads, positions, norm, activation, types of layers."""
    vocabulary: Vocabulary
    weights: str
    """SHA-256 of `organ.safetensors`."""
    training: dict[str, Any] | None
    """How it was trained after it was cut out; None where it was not."""
    licence: str | None
    """Of the source, as it says itself or as whoever cut the organ out said; None where nobody did."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all of it, and so over the weights."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        return self.fingerprint[:10]

    @property
    def layers(self) -> str:
        """Which of the source's layers it was, as `organ extract` takes them."""
        first, last = self.source.first, self.source.first + self.num_layers - 1
        return str(first) if first == last else f"{first}-{last}"

    def to_json(self) -> dict[str, Any]:
        return {**self.model_dump(), "fingerprint": self.fingerprint}


def read_manifest(folder: Path) -> Manifest:
    """OrganError where it is not there, of another format, or not as it was written."""
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise TypeError(f"found {type(said).__name__}, expected an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OrganError(
            f"{path}: not the manifest of an organ ({brief(error)}). Expected a folder that `organ extract` wrote."
        ) from error
    if said.get("format") != FORMAT:
        raise OrganError(f"{path}: format {said.get('format')!r}, expected {FORMAT}. Use the version that wrote it.")
    fingerprint = said.pop("fingerprint", None)
    try:
        manifest = Manifest.model_validate(said)
        unchanged = manifest.fingerprint == fingerprint
    except (ValueError, RecursionError) as error:  # of pydantic's, and half characters that have no bytes
        raise OrganError(f"{path}: not the manifest of an organ ({brief(error)}). Copy the organ again.") from error
    if not unchanged:
        raise OrganError(f"{path}: was changed after it was written (its fingerprint is another). Copy the organ again.")
    return manifest
