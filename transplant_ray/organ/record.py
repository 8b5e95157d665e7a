"""`insertion.json`: which layer of a model comes from where, and every file of the recipient that `remove` gives back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from transplant_ray.errors import OrganError
from transplant_ray.files import sha256_file
from transplant_ray.models.checkpoint import CARD, Checkpoint
from transplant_ray.models.convert import COMPANIONS
from transplant_ray.models.header import brief
from transplant_ray.organ.card import said_licence
from transplant_ray.organ.insertion import Insertion, Mode
from transplant_ray.organ.stack import split_name

FORMAT: Literal[1] = 1
RECORD, UNDO, REPLACED = "insertion.json", "undo", "layers.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RecordedLayer(_Part):
    organ: int | None
    """Which of the organs; None for the recipient."""
    index: int = Field(ge=0)


class RecordedOrgan(_Part):
    at: int
    fingerprint: str
    model: str
    """What it was cut out of."""
    revision: str | None
    layers: str
    trained: bool
    licence: str | None


class Record(_Part):
    format: Literal[1] = FORMAT
    mode: Mode
    recipient: str
    revision: str | None
    licence: str | None = None
    """Of the recipient, as its card says."""
    prefix: str
    """Name of the list of layers on disk."""
    organs: list[RecordedOrgan]
    layers: list[RecordedLayer]
    files: dict[str, str]
    """SHA-256 of every file of the recipient."""
    notes: list[str]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
                raise ValueError(f"{name!r} is not a file inside of the folder")
        return files

    def new_name(self, name: str) -> str | None:
        """Where a tensor of the recipient is in the new model; None where its layer was replaced."""
        place = split_name(name, self.prefix)
        if place is None:
            return name
        layer = self._places.get(place[0])
        return None if layer is None else f"{self.prefix}.{layer}.{place[1]}"

    @property
    def _places(self) -> Mapping[int, int]:
        return {layer.index: place for place, layer in enumerate(self.layers) if layer.organ is None}


def make_record(insertion: Insertion) -> Record:
    """Reads every byte of the recipient, for the hashes."""
    recipient = insertion.recipient
    folder = recipient.fetch()
    return Record(
        mode=insertion.mode,
        recipient=recipient.model,
        revision=recipient.revision,
        licence=said_licence(folder),
        prefix=insertion.stack.prefix,
        organs=[
            RecordedOrgan(
                at=placement.at,
                fingerprint=placement.organ.manifest.fingerprint,
                model=placement.organ.manifest.source.model,
                revision=placement.organ.manifest.source.revision,
                layers=placement.organ.manifest.layers,
                trained=placement.organ.manifest.training is not None,
                licence=placement.organ.manifest.licence,
            )
            for placement in insertion.placements
        ],
        layers=[RecordedLayer(organ=layer.organ, index=layer.index) for layer in insertion.layers],
        files={name: sha256_file(folder / name) for name in promised_files(recipient)},
        notes=list(insertion.warnings),
    )


def promised_files(recipient: Checkpoint) -> list[str]:
    """Weights, all that travels with them, the card; and of a recipient that has organs itself what undoes those."""
    folder = recipient.fetch()
    beside = [path for pattern in (*COMPANIONS, CARD) for path in folder.glob(pattern)]
    below = (folder / UNDO).rglob("*") if (folder / RECORD).is_file() else ()
    found = {path.relative_to(folder).as_posix() for path in (*beside, *below) if path.is_file()}
    return sorted(found | set(recipient.weight_files()))


def read_record(folder: Path) -> Record:
    path = folder / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        raise OrganError(
            f"{path}: nothing can be taken out ({brief(error)}). Expected a folder that `organ insert` wrote."
        ) from error
