"""Rows of JSONL and Parquet files and of hub datasets, one at a time, and texts that are made of their columns."""

from __future__ import annotations

import difflib
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from transplant_ray import zoo
from transplant_ray.errors import DataError
from transplant_ray.recipe import HubData
from transplant_ray.tables import UNREADABLE

Row = Mapping[str, Any]


def stream_rows(data: str | HubData) -> Iterator[Row]:
    """Rows in the order of the data, never more than a piece of a file. DataError, as they are read, where they cannot be."""
    return hub_rows(data) if isinstance(data, HubData) else _file_rows(data)


def _file_rows(data: str) -> Iterator[Row]:
    path = Path(zoo.resolve(data))
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise DataError(f"{data}: no such file. Give a .jsonl or .parquet file, or a hub dataset {{path, split}}.")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{data}: {path.suffix or 'no suffix'} is not read; expected one of {', '.join(READERS)}.")
    yield from reader(path)


def render(template: str, row: Row, where: str) -> str:
    """Fill `{column}` fields; `{{` is a brace. DataError for a field that is no column, or empty in this row."""
    return "".join(text + ("" if field is None else _column(row, field, where)) for text, field in template_fields(template, where))


def template_fields(template: str, where: str) -> list[tuple[str, str | None]]:
    """Texts, each with the column that follows it."""
    try:
        return [(text, _plain_field(*parts)) for text, *parts in string.Formatter().parse(template)]
    except ValueError as error:
        raise DataError(f"{where}: the template {template!r} is malformed ({error}). Write {{{{ for a brace.") from error


def _plain_field(field: str | None, layout: str | None, conversion: str | None) -> str | None:
    if layout or conversion:
        raise ValueError(f"{field!r} has a format of its own, and columns are filled in as they are")
    return field


def _column(row: Row, field: str, where: str) -> str:
    if field not in row:
        near = difflib.get_close_matches(field, [str(key) for key in row], n=1)
        hint = f" Did you mean {{{near[0]}}}?" if near else ""
        raise DataError(f"{where}: no column {field!r}; columns are {', '.join(map(str, row))}.{hint}")
    if row[field] is None:
        raise DataError(f"{where}: column {field!r} is empty. Fill it or remove the row.")
    try:
        text = str(row[field])
        text.encode()
    except (UnicodeEncodeError, RecursionError) as error:  # JSON can name half a character, "\ud800", and nest without an end
        raise DataError(f"{where}: column {field!r} is no text that can be written ({error}). Mend or remove the row.") from error
    return text


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:  # lines, unlike splitlines, end nowhere but at the end of a line
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}). Expected one object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: found {type(row).__name__}, expected one JSON object a line.")
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def hub_rows(data: HubData) -> Iterator[Row]:
    from datasets import load_dataset  # two seconds of import that only hub data needs
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(data.path, data.name, split=data.split, revision=data.revision)  # lies on disk, read as it is asked
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{data.path}: the hub dataset cannot be loaded ({error}). Check path, name, split and network.") from error


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
