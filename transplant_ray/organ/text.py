"""The text that an organ is trained on, as a stream: never more than a piece of it is in memory."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transplant_ray.errors import DataError
from transplant_ray.recipe import CorpusSpec, HubData
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

    @property
    def digest(self) -> bytes:
        """Of what it says."""
        return hashlib.sha256(self.text.encode()).digest()


def stream_passages(corpus: CorpusSpec) -> Iterator[Passage]:
    """The text of a corpus, in its order. DataError, as it is read, for files that are not there, or are no text."""
    low, high = corpus.share
    gap = False  # before a piece whose predecessor is left out
    for passage in _all_passages(corpus):
        if low <= place_of(passage.digest, "share") < high:
            yield replace(passage, first=passage.first or gap)
            gap = False
        else:
            gap = True


def place_of(digest: bytes, salt: str) -> float:
    """Where a text stands between 0 and below 1, by what it says alone: the same text is in the same share wherever it stands."""
    return (number_of(f"{salt}:{digest.hex()}") >> 10) / 2**53


def number_of(text: str) -> int:
    """From 0 to below 2⁶³, by a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _all_passages(corpus: CorpusSpec) -> Iterator[Passage]:
    for each in corpus.data:
        if isinstance(each, HubData):
            yield from _rows(each, each.path, corpus.text)
            continue
        for path in data_files(each):
            if path.suffix in READERS:
                yield from _rows(str(path), str(path), corpus.text)
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
