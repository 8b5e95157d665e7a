"""Tables of rows as Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transplant_ray.errors import RunError
from transplant_ray.files import whole_file

UNREADABLE = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError)
"""What pyarrow raises where a Parquet file is damaged, or holds what Python cannot: no UTF-8, an unknown time zone."""
ROWS_AT_ONCE = 16_384
"""In memory, of those that are read or written one after another."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Rows as one Parquet file, replaced in one step; some thousands of them are in memory at a time."""
    left = iter(rows)
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while some := [dict(row) for row in islice(left, ROWS_AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def read_rows(path: Path, filters: Sequence[tuple[str, str, Any]] | None = None) -> list[dict[str, Any]]:
    """Rows of a Parquet file, or those that pass all of pyarrow's `filters`; RunError where it cannot be read."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, filters=None if filters is None else list(filters)).to_pylist()
    except UNREADABLE as error:
        raise RunError(f"{path}: not a readable Parquet file ({error}). Run the sweep again.") from error
    return rows
