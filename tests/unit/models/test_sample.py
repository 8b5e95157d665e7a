"""A sample of a checkpoint: what tells two copies of a folder apart without reading all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transplant_ray.errors import CheckpointError
from transplant_ray.models import fingerprint as module
from transplant_ray.models.fingerprint import SAMPLE, sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("of no account")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(os.urandom(3 * SAMPLE))
    return tmp_path


@pytest.mark.parametrize("place", [0, SAMPLE - 1, 2 * SAMPLE, 3 * SAMPLE - 1])
def test_a_byte_at_either_end_of_the_weights_is_seen(folder: Path, place: int) -> None:
    before = sample(folder)
    _change(folder / "model.safetensors", place)
    assert sample(folder) != before


def test_so_are_sizes_names_and_any_byte_of_a_small_file(folder: Path) -> None:
    seen = [sample(folder)]
    (folder / "config.json").write_text("[]")
    seen.append(sample(folder))
    (folder / "config.json").rename(folder / "other.json")
    seen.append(sample(folder))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:SAMPLE] + content[SAMPLE + 1 :])
    seen.append(sample(folder))
    assert len(set(seen)) == 4


def test_what_no_loader_reads_is_not_and_the_middle_of_a_large_file_is_not_read(folder: Path) -> None:
    before = sample(folder)
    (folder / "README.md").write_text("changed")
    _change(folder / "model.safetensors", 3 * SAMPLE // 2)
    assert sample(folder) == before


def test_a_large_checkpoint_takes_no_longer_than_a_small_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "huge.safetensors").touch()
    os.truncate(folder / "huge.safetensors", 1 << 40)
    monkeypatch.setattr(module, "sha256_file", None)
    assert len(sample(folder)) == 64


def test_a_folder_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        sample(tmp_path / "gone")


def _change(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
