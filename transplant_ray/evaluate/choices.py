"""Rows with choices: what is chosen from, and which of it is right."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transplant_ray.errors import DataError
from transplant_ray.evaluate.example import Example


@dataclass(frozen=True)
class Choosing:
    """A row of a task with choices, as its templates render it."""

    where: str
    prompt: str
    answer: str
    choices: tuple[str, ...]


def _text(answer: str, choices: Sequence[str]) -> int | None:
    texts = [choice.strip() for choice in choices]
    return texts.index(answer) if answer in texts else None


def _index(answer: str, choices: Sequence[str]) -> int | None:
    return int(answer) if answer in map(str, range(len(choices))) else None


def _letter(answer: str, choices: Sequence[str]) -> int | None:
    letters = string.ascii_uppercase[: len(choices)]
    return letters.index(answer.upper()) if len(answer) == 1 and answer.upper() in letters else None


WAYS: Mapping[str, Callable[[str, Sequence[str]], int | None]] = MappingProxyType(
    {"text": _text, "index (from 0)": _index, "letter": _letter}
)
"""How data may say which choice is right."""


def settle(rows: Sequence[Choosing]) -> list[Example]:
    """Examples whose answer is the text of the right choice.

    All rows say it in one way: by its text, its index from 0, or its letter. DataError where no way fits all rows, or two ways fit
    and mean different choices.
    """
    found = {way: [read(row.answer.strip(), row.choices) for row in rows] for way, read in WAYS.items()}
    fits = {way: [place for place in places if place is not None] for way, places in found.items() if None not in places}
    if not fits:
        raise _no_way(rows, found)
    (first, places), *others = fits.items()
    for way, theirs in others:
        for row, ours, other in zip(rows, places, theirs, strict=True):
            if ours != other:
                raise DataError(
                    f"{row.where}: the answer {row.answer!r} is the {first} of {row.choices[ours]!r} and the {way} of "
                    f"{row.choices[other]!r}, and all rows can be read in both ways. Give letters, or texts that are no numbers."
                )
    return [Example.of(row.prompt, row.choices[place], row.choices) for row, place in zip(rows, places, strict=True)]


def _no_way(rows: Sequence[Choosing], found: Mapping[str, Sequence[int | None]]) -> DataError:
    best = max(found, key=lambda way: sum(place is not None for place in found[way]))
    row = rows[list(found[best]).index(None)]
    return DataError(
        f"{row.where}: the answer {row.answer!r} is not the {best} of one of the choices {list(row.choices)}. "
        "It must be the text of a choice in all rows, or its index from 0 in all, or its letter in all."
    )


def check_choices(choices: Sequence[Any], where: str) -> tuple[str, ...]:
    """DataError where there are fewer than two, or one is empty, or two are alike."""
    texts = tuple("" if choice is None else str(choice) for choice in choices)
    stripped = [text.strip() for text in texts]
    if len(texts) < 2 or "" in stripped or len(set(stripped)) < len(stripped):
        raise DataError(f"{where}: found {list(choices)}, expected two choices or more, none empty and no two alike.")
    return texts
