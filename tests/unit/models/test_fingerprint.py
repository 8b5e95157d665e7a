"""A fingerprint changes with every byte that decides how a checkpoint behaves, and with no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_tiny

from transplant_ray.errors import CheckpointError
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.fingerprint import fingerprint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("saved") / "model", shard="40KB")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "merges.txt").write_text("a b")
    (folder / "modeling_ours.py").write_text("x = 1")
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Checkpoint:
    """A copy of its own, which is still the same checkpoint."""
    shutil.copytree(saved, tmp_path / "copy")
    made = open_checkpoint(str(tmp_path / "copy"))
    assert fingerprint(made) == fingerprint(open_checkpoint(str(saved)))
    return made


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "pattern",
    [
        "model-00001*.safetensors", "model-00002*.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "modeling_ours.py",
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", [0, -1])
def test_one_bit_of_what_is_read_changes_it(checkpoint: Checkpoint, pattern: str, at: int) -> None:
    assert checkpoint.folder is not None
    (path,) = checkpoint.folder.glob(pattern)
    before, stat = fingerprint(checkpoint), path.stat()
    flip(path, at)
    assert path.stat().st_size == stat.st_size
    assert fingerprint(checkpoint) != before
    flip(path, at)
    assert fingerprint(checkpoint) == before


def test_a_file_more_or_less_or_of_another_name_changes_it(checkpoint: Checkpoint) -> None:
    assert checkpoint.folder is not None
    path, before = checkpoint.folder / "chat_template.jinja", fingerprint(checkpoint)
    path.rename(path.with_name("other.jinja"))
    renamed = fingerprint(checkpoint)
    path.with_name("other.jinja").unlink()
    assert len({before, renamed, fingerprint(checkpoint)}) == 3


def test_what_no_loader_reads_does_not(checkpoint: Checkpoint) -> None:
    assert checkpoint.folder is not None
    before = fingerprint(checkpoint)
    (checkpoint.folder / "README.md").write_text("another card")
    (checkpoint.folder / "notes.txt").write_text("notes")
    (checkpoint.folder / ".cache").write_text("hidden")
    assert fingerprint(checkpoint) == before


def test_a_checkpoint_of_the_hub_is_its_id_and_commit(checkpoint: Checkpoint) -> None:
    remote = replace(checkpoint, folder=None, model="someone/model", revision="a" * 40)
    found = {
        fingerprint(remote),
        fingerprint(replace(remote, revision="b" * 40)),
        fingerprint(replace(remote, model="someone/other")),
        fingerprint(checkpoint),
    }
    assert len(found) == 4
    assert fingerprint(replace(remote)) in found


def test_a_folder_that_is_gone_is_named(checkpoint: Checkpoint) -> None:
    assert checkpoint.folder is not None
    assert json.loads((checkpoint.folder / "config.json").read_text())
    shutil.rmtree(checkpoint.folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(checkpoint)
