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
            raise CheckpointError(f"{checkpoint.folder}: cannot be read ({error}). Check the storage and the rights.") from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in found if path.suffix not in ASIDE or path.name in READ_ALL_THE_SAME)
