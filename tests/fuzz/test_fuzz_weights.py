"""Spoilt safetensors headers and shard indexes: who reads a checkpoint gets its tensors, or an error of ours."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON_TEXTS, Hand, ends_well
from tiny import save_tiny

from transplant_ray.errors import CheckpointError, TransplantError
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from transplant_ray.models.compare import compare
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.models.header import read_header
from transplant_ray.models.loading import load_tensors

DTYPES = ("F8_E4M3", "U8", "I32", "BOOL", "F64", "F16", "BF16", "", "f32", "C64")
SHAPES: tuple[list[Any], ...] = ([], [1] * 65, [0, 2**62], [32, 32, 1], [2**62] * 4, [True], [1.0])
PLACES = ([0, 10**15], [10**15, 10**15 + 4], [-4, 0], [0, 0], [4, 0], [2**63, 2**64])


@dataclass(frozen=True)
class Whole:
    """A good checkpoint, to be spoilt in copies."""

    folder: Path
    checkpoint: Checkpoint

    def copy(self, folder: Path, changed: str, content: bytes) -> Path:
        """The same folder, by links, with another content under one name."""
        folder.mkdir()
        for path in self.folder.iterdir():
            if path.name != changed:
                (folder / path.name).symlink_to(path)
        (folder / changed).write_bytes(content)
        return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = save_tiny(tmp_path_factory.mktemp("single"), seed=1, num_hidden_layers=1)
    return Whole(folder, open_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = save_tiny(tmp_path_factory.mktemp("sharded"), seed=2, shard="20KB", num_hidden_layers=1)
    return Whole(folder, open_checkpoint(str(folder)))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def pack(header: str, data: bytes) -> bytes:
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + data


def spoilt_weights(content: bytes, seed: int) -> bytes:
    hand = Hand(f"header {seed}", values=(*DTYPES, *SHAPES, *PLACES))
    header, data = split(content)
    match seed % 4:
        case 0:
            return hand.bytes(content[: len(content) - len(data)]) + data
        case 1:
            return pack(hand.json(header, JSON_TEXTS), data)
        case 2:
            return hand.random.choice((10**15, 2**64 - 1, 0, len(content), 99_999_999)).to_bytes(8, "little") + content[8:]
    name = hand.random.choice([name for name in header if name != "__metadata__"])
    key, values = hand.random.choice((("dtype", DTYPES), ("shape", SHAPES), ("data_offsets", PLACES)))
    header[name][key] = hand.random.choice(values)
    if hand.random.random() < 0.4:  # the bytes fit what is said of them
        header[name] = {**split(content)[0][name], "dtype": "F8_E4M3", "shape": hand.random.choice(SHAPES)}
    return pack(json.dumps(header), data)


def spoilt_index(index: dict[str, Any], seed: int) -> bytes:
    shards = [
        SINGLE,
        "../whole/model.safetensors",
        ".safetensors",
        "/dev/zero.safetensors",
        "config.json",
        "a\x00.safetensors",
        "x" * 300 + ".safetensors",
    ]
    hand = Hand(f"index {seed}", values=(*shards, "model.norm.weight"))
    match seed % 3:
        case 0:
            return hand.bytes(json.dumps(index).encode())
        case 1:
            return hand.json(index).encode()
    return json.dumps({**index, "weight_map": hand.tree(index["weight_map"])}).encode()


def use(folder: Path, whole: Whole, out: Path) -> None:
    """What a sweep does with a checkpoint: read it, compare, read tensors, load it as source and as target, export."""
    spoilt = open_checkpoint(str(folder))
    assert spoilt.num_parameters >= 0
    for name in spoilt.tensors:
        with suppress(TransplantError):
            load_tensors(spoilt, [name])
    pair = compare(spoilt, whole.checkpoint)
    with suppress(TransplantError):
        load_resident_pair(pair, "float32")
    back = compare(whole.checkpoint, spoilt)
    with suppress(TransplantError):
        export_checkpoint(back, Variant.uniform(list(back.pairs)[:2], 0.5), out, "card")
    fingerprint(spoilt)
    load_resident_pair(back, "float32")


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_header_is_read_or_refused(single: Whole, tmp_path: Path, seed: int) -> None:
    content = spoilt_weights((single.folder / SINGLE).read_bytes(), seed)
    ends_well(lambda: use(single.copy(tmp_path / "spoilt", SINGLE, content), single, tmp_path / "out"))


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_index_is_followed_or_refused(sharded: Whole, tmp_path: Path, seed: int) -> None:
    content = spoilt_index(json.loads((sharded.folder / INDEX).read_text()), seed)
    ends_well(lambda: use(sharded.copy(tmp_path / "spoilt", INDEX, content), sharded, tmp_path / "out"))


def test_some_are_read_and_some_are_refused(single: Whole, sharded: Whole, tmp_path: Path) -> None:
    weights, index = (single.folder / SINGLE).read_bytes(), json.loads((sharded.folder / INDEX).read_text())
    makers = {
        "header": lambda n: single.copy(tmp_path / f"header{n}", SINGLE, spoilt_weights(weights, n)),
        "index": lambda n: sharded.copy(tmp_path / f"index{n}", INDEX, spoilt_index(index, n)),
    }
    for what, make in makers.items():
        folders = [str(make(n)) for n in range(60)]
        assert {ends_well(partial(open_checkpoint, folder)) for folder in folders} == {True, False}, what


# What the hand has found.


@pytest.mark.parametrize("dimensions", [65, 200_000])
def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path, dimensions: int) -> None:
    """torch reads no more than 64, by a RuntimeError; and the product of so many sizes takes minutes."""
    shape = [1] * 65 if dimensions == 65 else [2**62] * dimensions
    (tmp_path / SINGLE).write_bytes(pack(json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}), b"x"))
    with pytest.raises(CheckpointError, match=f"{SINGLE}: the safetensors header is corrupt .a tensor of {dimensions} dimensions"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_an_index_that_transformers_could_not_read_is_refused_at_the_door(sharded: Whole, tmp_path: Path, metadata: Any) -> None:
    index = {**json.loads((sharded.folder / INDEX).read_text()), "metadata": metadata}
    if metadata is None:
        del index["metadata"]
    with pytest.raises(CheckpointError, match=f"{INDEX}: no `metadata`"):
        open_checkpoint(str(sharded.copy(tmp_path / "spoilt", INDEX, json.dumps(index).encode())))


def test_weights_that_the_disk_does_not_give_are_named(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / SINGLE)  # opens, and cannot be read at its beginning
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: cannot be read \(.*\)\. Check the disk and the rights"):
        read_header(tmp_path / SINGLE)
