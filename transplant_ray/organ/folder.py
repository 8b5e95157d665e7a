"""An organ on disk: a folder with `organ.safetensors`, `organ.json`, a card, and the licence of the model that it was cut out of.

The layers are numbered from 0, under the name that their list has in the loaded model. `organ.json` has the hash of the weights and
a fingerprint of itself, so that neither changes unseen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING

from transplant_ray.errors import CheckpointError, OrganError
from transplant_ray.files import sha256_file, whole_folder, write_json, write_text
from transplant_ray.models.checkpoint import CARD, CONFIG_ERRORS, Checkpoint
from transplant_ray.models.families import FAMILIES
from transplant_ray.models.header import TensorInfo, brief, read_header
from transplant_ray.models.writing import MakeTensor, write_safetensors
from transplant_ray.organ.card import organ_card
from transplant_ray.organ.manifest import MANIFEST, WEIGHTS, Manifest, Source, read_manifest
from transplant_ray.organ.settings import LayerType, layer_types
from transplant_ray.organ.stack import Stack, read_stack
from transplant_ray.organ.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LICENCES = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Organ:
    manifest: Manifest
    checkpoint: Checkpoint
    """Its folder as a checkpoint of nothing but layers: `load_tensors` and `read_stack` work on it, loading a model does not."""
    stack: Stack

    @property
    def num_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def types(self) -> tuple[LayerType, ...]:
        return layer_types(self.checkpoint.config)


def open_organ(folder: Path) -> Organ:
    """Read an organ and hold it against its hashes. OrganError where it is damaged, was changed, or is of another format."""
    manifest = read_manifest(folder)
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != manifest.weights:
        raise OrganError(f"{weights}: missing or damaged (its SHA-256 is not that of {MANIFEST}). Copy the organ again.")
    try:  # with the hashes right, whoever wrote it may still have been wrong
        checkpoint = Checkpoint(str(folder), None, folder, _config(folder, manifest), read_header(weights))
        if manifest.num_layers > len(checkpoint.tensors):  # before a model of so many layers is built, even without its weights
            raise OrganError(f"{folder}: {len(checkpoint.tensors)} tensors cannot be {manifest.num_layers} layers. Make it again.")
        stack = read_stack(checkpoint)
    except CheckpointError as error:
        raise OrganError(f"not a whole organ: {error}") from error
    known = {stack.name(layer, path) for layer, paths in enumerate(stack.layers) for path in paths}
    if strangers := sorted(checkpoint.tensors.keys() - known):
        raise OrganError(f"{weights}: {strangers[0]} belongs to no layer ({len(strangers)} such tensors). Make the organ again.")
    return Organ(manifest, checkpoint, stack)


def write_organ(
    out: Path,
    layout: Mapping[str, TensorInfo],
    make: Mapping[str, MakeTensor],
    *,
    config: PretrainedConfig,
    source: Source,
    vocabulary: Vocabulary,
    licence: str | None,
    licences: Path | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write an organ: the tensors of `make`, by their names in a loaded model of these layers alone, stored as `layout` says.

    `config` is that model's; licence files come from the folder `licences`. RunError where `out` exists or there is no room, and
    then nothing is left behind.
    """
    with whole_folder(out) as folder:
        write_safetensors(folder / WEIGHTS, layout, make)
        manifest = Manifest(
            family=config.model_type,
            num_layers=config.num_hidden_layers,
            source=source,
            config=_spelt_out(config),
            vocabulary=vocabulary,
            weights=sha256_file(folder / WEIGHTS),
            training=None if training is None else dict(training),
            licence=licence,
        )
        write_json(folder / MANIFEST, manifest.to_json())
        write_text(folder / CARD, organ_card(manifest))
        for path in [] if licences is None else licence_files(licences):
            shutil.copyfile(path, folder / path.name)
    return out


def licence_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file())


def _spelt_out(config: PretrainedConfig) -> dict[str, Any]:
    """As JSON, without what tells of another folder."""
    said: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in said.items() if key not in ("_name_or_path", "architectures")}


def _config(folder: Path, manifest: Manifest) -> PretrainedConfig:
    if manifest.family not in FAMILIES:
        raise OrganError(f"{folder}: family {manifest.family!r} is not known. Expected one of {', '.join(sorted(FAMILIES))}.")
    try:
        config = CONFIG_MAPPING[manifest.family].from_dict(manifest.config)
    except CONFIG_ERRORS as error:
        raise OrganError(f"{folder}: its config cannot be read ({brief(error)}). Copy the organ again.") from error
    found, said = (config.model_type, config.num_hidden_layers), (manifest.family, manifest.num_layers)
    if found != said:
        raise OrganError(f"{folder}: family and number of layers are {said}, its config says {found}. Make it again.")
    return config
