"""The safetensors header reader, held against the library that wrote the files, and against files that lie."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transplant_ray.errors import CheckpointError
from transplant_ray.models.header import DTYPES, read_header

Header = dict[str, Any]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text('ab.é"\\\n 漢', min_size=1, max_size=8)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bytes that a tensor of this dtype may have."""
    integers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return (integers * (1 if dtype == "BOOL" else 97)).to(DTYPES[dtype])


@given(tensors, st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_header_finds_every_tensors_bytes(described: dict[str, tuple[str, tuple[int, ...]]], metadata: bool) -> None:
    expected = {name: random_tensor(*kind, seed) for seed, (name, kind) in enumerate(described.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.safetensors"
        save_file(expected, path, {"format": "pt"} if metadata else None)
        found, content = read_header(path), path.read_bytes()
    assert found.keys() == expected.keys()
    for name, info in found.items():
        stored = content[info.start : info.start + info.num_bytes]
        assert (info.file, info.shape, DTYPES[info.dtype]) == (path.name, tuple(expected[name].shape), expected[name].dtype)
        assert stored == expected[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def pack(header: object, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object, *offsets: object, dtype: object = "U8") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


A = {"a": entry([4], 0, 4)}
CORRUPT: dict[str, bytes] = {
    "empty file": b"",
    "shorter than a length": b"\x01\x00\x00",
    "header beyond the file": (10_000).to_bytes(8, "little") + b"{}",
    "absurd length": (2**63).to_bytes(8, "little") + bytes(100),
    "not JSON": pack(b"{'a': 1}"),
    "not text": pack(b"\xff\xfe\x00\x01"),
    "a list": pack([1, 2]),
    "null": pack(None),
    "deep nesting": pack(b'{"a":' + b"[" * 100_000),
    "entry is no object": pack({"a": 3}),
    "no offsets": pack({"a": {"dtype": "U8", "shape": [12]}}),
    "no shape": pack({"a": {"dtype": "U8", "data_offsets": [0, 12]}}),
    "no dtype": pack({"a": {"shape": [12], "data_offsets": [0, 12]}}),
    "one offset": pack({"a": entry([12], 12)}),
    "three offsets": pack({"a": entry([12], 0, 6, 12)}),
    "overlap": pack(A | {"b": entry([10], 2, 12)}),
    "the same bytes twice": pack({"a": entry([12], 0, 12), "b": entry([12], 0, 12)}),
    "gap": pack(A | {"b": entry([6], 6, 12)}),
    "overlap and gap of one size": pack({"a": entry([4], 0, 4), "b": entry([4], 2, 6), "c": entry([4], 8, 12)}),
    "gap at the start": pack({"a": entry([8], 4, 12)}),
    "bytes left over": pack({"a": entry([8], 0, 8)}),
    "past the end": pack({"a": entry([16], 0, 16)}),
    "no tensors but data": pack({}),
    "end before start": pack({"a": entry([4], 8, 4), "b": entry([12], 0, 12)}),
    "negative offset": pack({"a": entry([16], -4, 12)}),
    "shape and bytes disagree": pack({"a": entry([3], 0, 12)}),
    "dtype and bytes disagree": pack({"a": entry([12], 0, 12, dtype="F32")}),
    "two negative lengths": pack({"a": entry([-3, -4], 0, 12)}),
    "boolean in the shape": pack({"a": entry([True, 12], 0, 12)}),
    "boolean offset": pack({"a": entry([12], False, 12)}),
    "text in the shape": pack({"a": entry(["12"], 0, 12)}),
    "text for a shape": pack({"a": entry("12", 0, 12)}),
    "text offsets": pack({"a": entry([12], "0", "12")}),
    "fraction in the shape": pack({"a": entry([12.0], 0, 12)}),
    "fractions for offsets": pack({"a": entry([12], 0.0, 12.0)}),
    "infinite length": pack(b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 12]}}'),
    "huge length": pack({"a": entry([2**64, 0], 0, 12)}),
    "huge offset": pack({"a": entry([12], 0, 10**400)}),
    "number with 9,000 digits": pack(b'{"a": {"dtype": "U8", "shape": [' + b"9" * 9000 + b'], "data_offsets": [0, 12]}}'),
    "dtype is a list": pack({"a": entry([12], 0, 12, dtype=["U8"])}),
    "dtype is null": pack({"a": entry([12], 0, 12, dtype=None)}),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_file_that_lies_about_itself_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(CORRUPT[name])
    with pytest.raises(CheckpointError, match=r"corrupt|truncated") as raised:
        read_header(path)
    assert str(path) in str(raised.value)
    assert "Download it again." in str(raised.value)


def test_the_corrupt_files_are_corrupt_for_the_library_too(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    for name, content in CORRUPT.items():
        path.write_bytes(content)
        with pytest.raises((SafetensorError, OSError)):  # noqa: PT012
            with safe_open(path, framework="pt"):
                pass
            pytest.fail(f"safetensors reads {name!r}")


@pytest.mark.parametrize("missing", [1, 100, 1_000])
def test_a_truncated_download_is_refused_with_both_sizes(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({"a": torch.zeros(300)}, path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - missing)
    with pytest.raises(CheckpointError, match=rf"truncated.* {size - missing} bytes, the header promises {size}"):
        read_header(path)


def test_a_dtype_we_do_not_know_is_read_and_left_to_the_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    path.write_bytes(pack({"a": entry([24], 0, 12, dtype="F4")}))
    assert read_header(path)["a"].dtype == "F4"


def flip_bytes(good: bytes, header: Header, dice: random.Random) -> bytes:
    changed = bytearray(good)
    for _ in range(dice.randint(1, 8)):
        changed[dice.randrange(8 + len(pack(header, b"")))] = dice.randrange(256)
    return bytes(changed)


def cut_or_grow(good: bytes, _header: Header, dice: random.Random) -> bytes:
    place = dice.randrange(len(good))
    return dice.choice([good[:place], good[:place] + dice.randbytes(5) + good[place:], good[:place] + good[place + 3 :]])


def swap_values(_good: bytes, header: Header, dice: random.Random) -> bytes:
    changed = json.loads(json.dumps(header))
    chosen = changed[dice.choice([name for name in changed if name != "__metadata__"])]
    odd = [None, True, -1, 0, 1.5, 2**70, "8", [], {}, [[1]], "F32", "U8", [0, 8], [8, 0], [2, 2]]
    chosen[dice.choice(sorted(chosen))] = dice.choice(odd)
    return pack(changed, bytes(40))


@pytest.mark.parametrize("mutate", [flip_bytes, cut_or_grow, swap_values])
def test_no_damage_brings_another_exception_or_a_reading_that_the_library_refuses(
    mutate: Callable[[bytes, Header, random.Random], bytes], tmp_path: Path
) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry([2, 2], 0, 16, dtype="F32"), "b.c": entry([12], 16, 40, dtype="BF16")}
    good, dice, path, refused = pack(header, bytes(40)), random.Random(0), tmp_path / "odd.safetensors", 0
    for _ in range(200):
        path.write_bytes(mutate(good, header, dice))
        try:
            found = read_header(path)
        except CheckpointError:
            refused += 1
            continue
        if all(info.dtype in DTYPES for info in found.values()):
            with safe_open(path, framework="pt") as reader:
                assert {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()} == {  # noqa: SIM118
                    name: info.shape for name, info in found.items()
                }
    assert refused > 50
