"""Read what a checkpoint holds from its config and safetensors headers, without loading a weight.

Everything here comes from outside and is checked at the door: file names that leave the folder, missing shards, headers that
lie about sizes, truncated files, pickles, quantised weights and models that are not decoders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from transplant_ray import zoo
from transplant_ray.errors import CheckpointError
from transplant_ray.models.convert import COMPANIONS, converted, is_pickle_only
from transplant_ray.models.header import TensorInfo, brief, read_header
from transplant_ray.storage import copy_here

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
CARD = "README.md"
"""It names the licence."""
CONFIG_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises where a config is not what it expects (RecursionError is a RuntimeError)."""


class _OnlyPickle(CheckpointError):
    """A hub repository without safetensors."""


@dataclass(frozen=True)
class Checkpoint:
    model: str
    """Folder or hub id, as the recipe names it."""
    revision: str | None
    """The commit of a hub checkpoint."""
    folder: Path | None
    """Where the files are; None for a hub checkpoint that was not fetched."""
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    remote_code: bool = False
    home: str | None = None
    """Address of a copy of `folder`, where that is on one machine and may be something else on another."""

    @property
    def num_parameters(self) -> int:
        return sum(prod(info.shape) for info in self.tensors.values())

    def fetch(self, files: Collection[str] | None = None) -> Path:
        """The folder with all files, or just these of the weights; downloads a hub checkpoint (once, into the hub's own cache)."""
        if self.folder is not None:
            return self.folder
        code = ("*.py",) if self.remote_code else ()
        folder = _download(self.model, self.revision, (*COMPANIONS, CARD, *code, *(files or ("*.safetensors",))))
        if lost := [file for file in files or self.weight_files() if not (folder / file).is_file()]:
            # where the hub does not answer, its client hands over whatever is in its cache
            raise CheckpointError(f"{self.model}: the hub did not give {lost[0]}. Try again, or download it by hand.")
        return folder

    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))


@contextmanager
def at_hand(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint in a folder of this machine, for as long as the block loads it.

    What lies in `folder` is not looked at where there is a `home`: here it may be of another run.
    """
    if checkpoint.home is None:
        yield checkpoint
        return
    with TemporaryDirectory(prefix="transplant_ray-") as folder:
        copy_here(checkpoint.home, Path(folder))
        yield replace(checkpoint, folder=Path(folder))


def open_checkpoint(model: str, revision: str | None = None, *, accept: Iterable[str] = ()) -> Checkpoint:
    """Read config and headers of a local folder, a `zoo:` name or a hub repository.

    `accept` may hold "remote_code" and "pickle". Raises CheckpointError, naming what was found, for anything that we cannot read.
    """
    location = zoo.resolve(model)
    remote_code, pickle = "remote_code" in accept, "pickle" in accept
    folder = Path(location)
    if os.path.exists(folder):  # unlike Path.exists, False for a name that no folder can have
        if not folder.is_dir():
            raise CheckpointError(f"{model}: not a folder. Expected a folder with config.json and safetensors.")
        if revision is not None:
            raise CheckpointError(f"{model}: `revision: {revision}` has no effect on a local folder. Remove it.")
        return _open_folder(model, folder, remote_code, pickle)
    if _looks_like_path(location):
        raise CheckpointError(f"{model}: no such folder. Give a folder with config.json and safetensors, or a hub id.")
    try:
        commit, tensors = _hub_tensors(location, revision)
    except _OnlyPickle:
        if not pickle:
            raise
        return _open_folder(model, _download(location, revision, (*COMPANIONS, "*.bin")), remote_code, pickle)
    return Checkpoint(location, commit, None, read_config(location, commit, remote_code), tensors, remote_code)


def _open_folder(model: str, folder: Path, remote_code: bool, pickle: bool) -> Checkpoint:
    if pickle and is_pickle_only(folder):
        folder = converted(folder, remote_code=remote_code)
    config, tensors = read_config(str(folder), None, remote_code), _local_tensors(folder)
    return Checkpoint(model, None, folder.absolute(), config, tensors, remote_code)  # who loads it may run in another folder


def _download(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HTTPError) as error:
        raise CheckpointError(f"{model}: download failed ({error}). Try again, or download it by hand.") from error


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1


def read_config(model: str, revision: str | None, remote_code: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=remote_code)
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"{model}: config.json cannot be read ({brief(error)}). Expected the config of a decoder that "
            "transformers knows; for a model with code of its own add `accept: [remote_code]`."
        ) from error
    _check_decoder(model, config)
    return config


def read_generation_ends(checkpoint: Checkpoint) -> int | list[int] | None:
    """End tokens of a model's generation config, or of its config where that names none."""
    place = checkpoint.folder or checkpoint.model
    ends: int | list[int] | None = None
    try:
        ends = GenerationConfig.from_pretrained(place, revision=checkpoint.revision).eos_token_id
    except CONFIG_ERRORS as error:
        there = checkpoint.folder is not None and (checkpoint.folder / GENERATION).exists()
        if there or not isinstance(error, OSError):  # not every checkpoint has a generation config
            raise CheckpointError(
                f"{checkpoint.model}: {GENERATION} cannot be read ({brief(error)}). Mend or remove it."
            ) from error
    if ends is None:
        ends = getattr(checkpoint.config, "eos_token_id", None)
    if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends or 0])):
        raise CheckpointError(
            f"{checkpoint.model}: {GENERATION}: `eos_token_id` is {ends!r}, expected a token id or a list of them."
        )
    return ends


def _check_decoder(model: str, config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{model}: the weights are quantised; linear maps can only be copied unquantised. Use the full-precision checkpoint."
        )
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{model}: {config.model_type} is not a decoder. Expected a causal language model.")


def _local_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).is_file():  # first, as transformers does where a folder has both
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed_tensors(folder)
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when loaded. Convert them to safetensors, "
            "or add `accept: [pickle]` to the recipe."
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there. Expected a checkpoint in safetensors.")


def _indexed_tensors(folder: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(folder / INDEX)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if not os.path.isfile(folder / file):  # unlike Path.is_file, False for a name that no file can have
            raise CheckpointError(f"{folder / INDEX}: shard {file!r} is missing. Download the checkpoint again.")
        headers[file] = read_header(folder / file)
    return _pick(str(folder / INDEX), weight_map, headers)


def _pick(place: str, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors that the index at `place` names, out of the headers of its shards."""
    if lost := sorted(name for name, file in weight_map.items() if name not in headers[file]):
        raise CheckpointError(
            f"{place}: {lost[0]} is not in {weight_map[lost[0]]} ({len(lost)} such tensors). Download the checkpoint again."
        )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a shard index ({brief(error)}). Download it again.") from error
    index = index if isinstance(index, dict) else {}
    weight_map = _checked_weight_map(str(path), index.get("weight_map"))
    if not isinstance(index.get("metadata"), dict):  # transformers reads no index without it
        raise CheckpointError(f"{path}: no `metadata`. Expected the index of a sharded safetensors checkpoint.")
    return weight_map


def _checked_weight_map(place: str, weight_map: Any) -> dict[str, str]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place}: no `weight_map`. Expected the index of a sharded safetensors checkpoint.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise CheckpointError(f"{place}: {name} points to {file!r}; a shard is a .safetensors file in the same folder.")
    return weight_map


def _hub_tensors(model: str, revision: str | None) -> tuple[str, dict[str, TensorInfo]]:
    """Commit and tensors of a hub repository, its headers read by range requests."""
    api = HfApi()
    try:
        commit = api.model_info(model, revision=revision).sha
        metadata = api.get_safetensors_metadata(model, revision=commit)
    except NotASafetensorsRepoError as error:
        raise _OnlyPickle(
            f"{model}: no safetensors on the hub, only pickle weights, which can run code when loaded. "
            "Choose a revision with safetensors, or add `accept: [pickle]`."
        ) from error
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"{model}: not a local folder, and the hub did not give it ({brief(error)}). "
            "Check the path or id, the revision, the network, and `hf auth login` for gated models."
        ) from error
    except (SafetensorsParsingError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{model}: the shard index or a safetensors header on the hub is corrupt ({brief(error)}). Choose another revision."
        ) from error
    weight_map = _checked_weight_map(f"{model}: {INDEX}", metadata.weight_map)
    headers = {
        file: {
            name: TensorInfo(file, info.dtype, tuple(info.shape), -1, info.data_offsets[1] - info.data_offsets[0])
            for name, info in header.tensors.items()
        }
        for file, header in metadata.files_metadata.items()
    }
    return str(commit), _pick(f"{model}: {INDEX}", weight_map, headers)
