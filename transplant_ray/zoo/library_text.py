"""General text that every machine with Python has: documentation and source of the standard library.

    prose     topics of the language reference (`help('lambda')`), docstrings, and what lies about as .rst and .txt
    source    the .py files, without their docstrings: so nothing is there twice

Nothing of it is ours and nothing of it is passed on: it is read where it is installed. Another version of Python has other text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Literal

LEFT_OUT = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
        "encodings", "pydoc_data",  # tables of characters; the topics, which are read as prose
    }
)  # fmt: skip
SUFFIXES = (".py", ".rst", ".txt")
GENERATED = ("_sysconfigdata",)
"""Files that say how this Python was built, and where: other machines of the same version have others."""
PIECE_CHARACTERS = 1500
"""Paragraphs of a file are gathered until they are so long, and then are a document."""
TOPICS = "pydoc_data.topics"


@dataclass(frozen=True)
class Document:
    text: str
    kind: Literal["prose", "source"]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def library_documents(characters: int, folder: Path | None = None) -> list[Document]:
    """At most so many characters, half of them prose where there is as much, in the order of their hashes; none is there twice.

    `folder` is the standard library's of the Python that runs, unless another is given.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    found = sorted({document.digest: document for document in _documents(root)}.items())
    prose = _within([document for _, document in found if document.kind == "prose"], characters // 2)
    rest = characters - sum(len(document.text) for document in prose)
    source = _within([document for _, document in found if document.kind == "source"], rest)
    return sorted([*prose, *source], key=lambda document: document.digest)


def _within(documents: Iterable[Document], characters: int) -> list[Document]:
    room = characters

    def fits(document: Document) -> bool:
        nonlocal room
        room -= len(document.text)
        return room >= 0

    return list(takewhile(fits, documents))


def _documents(root: Path) -> Iterator[Document]:
    yield from (Document(text, "prose") for text in _topics())
    for path in _files(root):
        text = _read(path)
        if text is None:
            continue
        if path.suffix == ".py":
            yield from _of_module(text)
        else:
            yield from (Document(piece, "prose") for piece in _gathered(text.split("\n\n")))


def _files(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - LEFT_OUT)  # never entered: packages lie in there by the thousand
        yield from (Path(place, name) for name in sorted(names) if name.endswith(SUFFIXES) and not name.startswith(GENERATED))


def _topics() -> Iterator[str]:
    """What `help` knows of the language; some distributions leave it out."""
    try:
        topics: dict[str, str] = import_module(TOPICS).topics
    except ImportError:
        return
    for _, text in sorted(topics.items()):
        yield from _gathered(text.strip().split("\n\n"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a few files are in other encodings, by intent
        return None


def _of_module(text: str) -> Iterator[Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own deprecated escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates that are no Python
        return
    docstrings = [expression for node in ast.walk(tree) if (expression := _docstring(node)) is not None]
    words = (inspect.cleandoc(str(expression.value.value)) for expression in docstrings)  # type: ignore[attr-defined]  # a Constant
    yield from (Document(piece, "prose") for piece in _gathered(words))
    silent = {line for each in docstrings for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}
    code = "".join(line for number, line in enumerate(text.splitlines(keepends=True), start=1) if number not in silent)
    yield from (Document(piece, "source") for piece in _gathered(code.split("\n\n")))


def _docstring(node: ast.AST) -> ast.Expr | None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return None
    first = node.body[0]
    said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first if said else None  # type: ignore[return-value]  # an Expr


def _gathered(parts: Iterable[str]) -> Iterator[str]:
    """Paragraphs put together until they are long enough; what is left over at the end is a document of its own."""
    piece = ""
    for part in parts:
        piece = f"{piece}\n\n{part}" if piece else part
        if len(piece) >= PIECE_CHARACTERS:
            yield piece.strip("\n")
            piece = ""
    if piece.strip():
        yield piece.strip("\n")
