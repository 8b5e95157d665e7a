"""What a checkpoint is, by its content: two with one fingerprint behave alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transplant_ray.errors import CheckpointError
from transplant_ray.files import sha256_file
from transplant_ray.models.checkpoint import Checkpoint

ASIDE = {".md", ".txt", ".png", ".gitattributes", ".bin", ".pt", ".pth", ".onnx", ".msgpack", ".h5", ".gguf"}
"""Suffixes of what no loader of ours reads."""
SAMPLE = 1 << 20
READ_ALL_THE_SAME = {"merges.txt", "vocab.txt"}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sha256 over names and bytes of weights, configs, tokenizer and code; of a hub checkpoint, over its id and commit.

    Reads every byte each time: a time stamp can lie. CheckpointError where a file cannot be read.
    """
    if checkpoint.folder is None:
        content = [["hub", checkpoint.model, str(checkpoint.revision)]]
    else:
        try:
            content = [[path.name, sha256_file(path), ""] for path in _files(checkpoint.folder)]
        except OSError as error:
            raise _unreadable(checkpoint.folder, error) from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sample(folder: Path) -> str:
    """Sha256 over names, sizes and both ends of the files that a fingerprint is of: it takes seconds where that takes minutes.

    It tells a copy that is out of date from one that is not, for training moves all tensors; it is no proof that they are equal.
    CheckpointError where a file cannot be read.
    """
    try:
        content = [[path.name, path.stat().st_size, *_ends(path)] for path in _files(folder)]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ends(path: Path) -> list[str]:
    """Hashes of the first and the last `SAMPLE` bytes; of a small file, both together are all of it."""
    with path.open("rb") as file:
        first = file.read(SAMPLE)
        file.seek(max(0, path.stat().st_size - SAMPLE))
        return [hashlib.sha256(part).hexdigest() for part in (first, file.read(SAMPLE))]


def _unreadable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder}: cannot be read ({error}). Check the storage and the rights.")


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in found if path.suffix not in ASIDE or path.name in READ_ALL_THE_SAME)
