"""The text that an organ is trained on, as a stream: never more than a piece of it is in memory."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transplant_ray.errors import DataError
from transplant_ray.recipe import HubData
from transplant_ray.rows import READERS, render, stream_rows

PASSAGE_CHARACTERS = 4096
"""A plain file is cut at the first end of a line after so many."""
LONGEST_LINE = 1 << 20
"""And within lines that do not end."""


@dataclass(frozen=True)
class Passage:
    """A document, or a piece of a plain file."""

    text: str
    first: bool = True
    last: bool = True


def stream_passages(data: Sequence[str | HubData], template: str) -> Iterator[Passage]:
    """All text of the data, in its order. DataError, as it is read, for files that are not there, or are no text."""
    for each in data:
        if isinstance(each, HubData):
            yield from _rows(each, each.path, template)
            continue
        for path in data_files(each):
            if path.suffix in READERS:
                yield from _rows(str(path), str(path), template)
            else:
                yield from _pieces(path)


def data_files(data: str) -> list[Path]:
    """The files of a path, of a folder with all below it, or of a pattern; in order of their names, hidden ones left out.

    DataError where there are none.
    """
    path = Path(os.path.expanduser(data))
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        return [path]
    if os.path.isdir(path):
        found = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    if files := sorted(file for file in found if file.is_file()):
        return files
    raise DataError(f"{data}: no such file, folder or pattern with files. Give text, .jsonl, .parquet, or hub:NAME?split=SPLIT.")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _rows(data: str | HubData, where: str, template: str) -> Iterator[Passage]:
    for number, row in enumerate(stream_rows(data), start=1):
        if text := render(template, row, f"{where}, row {number}, `text`"):
            yield Passage(text)


def _pieces(path: Path) -> Iterator[Passage]:
    try:
        with path.open(encoding="utf-8") as file:
            piece, first = _piece(file), True
            while piece:
                following = _piece(file)
                yield Passage(piece, first, last=not following)
                piece, first = following, False
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). Leave it out, or convert it.") from error


def _piece(file) -> str:  # type: ignore[no-untyped-def]  # TextIO, which pathlib does not promise
    return str(file.read(PASSAGE_CHARACTERS) + file.readline(LONGEST_LINE))
