"""The parts of a page of the ledger: Parquet files that are written whole and named by the hash of their bytes.

Many are read side by side, and merged into one: a sweep of days writes thousands, and an object store answers each after a while.
The merged part is there before those that it holds are removed, so whoever dies or reads in between finds every row, some twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transplant_ray.evaluate.results import OUTCOME_SCHEMA
from transplant_ray.shelf import Shelf
from transplant_ray.tables import ROWS_AT_ONCE, UNREADABLE

SCHEMA = pa.schema([*OUTCOME_SCHEMA, ("asked", pa.string()), ("seconds", pa.float64())])
OPTIONAL = {"error", "loss"}
"""Columns that may be empty."""
MANY = 64
"""Parts of a page, above which they are merged when it is read."""
HANDS = 16
"""Threads that wait for the storage."""
AT_ONCE = 256
"""Parts whose bytes are in memory at a time."""


@dataclass(frozen=True)
class Part:
    name: str
    table: pa.Table

    def rows(self) -> Iterator[dict[str, Any]]:
        """Some at a time: of a merged part they are many times its size."""
        for batch in self.table.to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from batch.to_pylist()


def write_part(shelf: Shelf, page: str, table: pa.Table) -> str:
    """Returns its name. RunError where there is no room."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"{page}/{hashlib.sha256(content).hexdigest()}.parquet"
    shelf.write(name, content)
    return name


def read_parts(shelf: Shelf, page: str, note: Callable[[str], None]) -> Iterator[Part]:
    """All parts of a page. One whose bytes do not have its name, or are no outcomes, is set aside, and `note` is told."""
    seen: set[str] = set()
    with ThreadPoolExecutor(HANDS) as hands:
        gone = True
        while gone:  # another driver has merged parts that were here: what was in them is in one that was not
            names = [name for name in shelf.names(page) if name not in seen]
            seen.update(names)
            gone = False
            for name, content in _contents(hands, shelf, names):
                gone = gone or content is None
                if content is not None and (part := _part(shelf, name, content, note)):
                    yield part


def merge_parts(shelf: Shelf, page: str, tables: Mapping[str, pa.Table]) -> None:
    """One part of the tables of many, given by their names. RunError where there is no room: then all is as it was."""
    merged = write_part(shelf, page, pa.concat_tables(tables.values()))
    with ThreadPoolExecutor(HANDS) as hands:
        list(hands.map(shelf.discard, [name for name in tables if name != merged]))


def _contents(hands: ThreadPoolExecutor, shelf: Shelf, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        yield from zip(some, hands.map(shelf.read_present, some), strict=True)


def _part(shelf: Shelf, name: str, content: bytes, note: Callable[[str], None]) -> Part | None:
    part = _parse(name, content) if hashlib.sha256(content).hexdigest() == _stem(name) else None
    if part is None:
        shelf.set_aside(name)
        note(f"ledger: {name} is damaged and set aside; what it held is evaluated again")
    return part


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".parquet")


def _parse(name: str, content: bytes) -> Part | None:
    """None where it is no table of ours."""
    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)
    except UNREADABLE:
        return None
    return Part(name, table) if table.schema.equals(SCHEMA) and _is_whole(table) else None


def _is_whole(table: pa.Table) -> bool:
    """Whether all is there that an outcome must have, and its numbers are numbers: a name says nothing of who wrote the bytes."""
    there = not any(table[name].null_count for name in SCHEMA.names if name not in OPTIONAL)
    return there and all(pc.all(pc.is_finite(table[name]), min_count=0).as_py() for name in ("seconds", "loss"))
