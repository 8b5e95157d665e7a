"""Which row of a task's data is meant: by the data's own id, by number, by content hash, or by what is asked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from transplant_ray.errors import DataError

OWN_IDS = ("unique_id", "id")
"""Columns that name a row; the first that the data has."""


class RowIndex:
    """The rows of a task's data, to be found by what a row of another file says of them.

    `columns` are those of the prompt; each of `hashes` has a content hash for every row. Where the data's own ids are numbers, a
    number is an id. DataError where the data has an id twice.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *hashes: Sequence[str]) -> None:
        self.columns = columns
        own_id = next((name for name in OWN_IDS if name in rows[0]), None)
        own = [str(row.get(own_id)) for row in rows] if own_id else []
        if len(set(own)) < len(own):
            raise DataError(f"the data: column `{own_id}` has a value twice, so it names no row. Rename the column.")
        numbers = [] if any(text.isdecimal() for text in own) else [str(number) for number in range(len(rows))]
        self.ids: tuple[str | int, ...] = tuple(own or range(len(rows)))
        """Of every row: its own id, or its number where it has none."""
        self.numbers = {name: number for names in (*hashes, numbers, own) for number, name in enumerate(names)}
        self.prompts = {self._prompt(row): number for number, row in enumerate(rows)}
        kinds = [f"`{own_id}` of the data"] * bool(own) + ["its row number (from 0)"] * bool(numbers) + ["its content hash"]
        self.expected = " or ".join(kinds)

    def find(self, row: Mapping[str, Any], where: str) -> int:
        """Number of the row, from 0, that `id` or the prompt's columns name. DataError where none is meant, or two are."""
        asked = self._find_prompt(row, where) if all(column in row for column in self.columns) else None
        named = self._find_id(row["id"], where) if "id" in row else None
        if named is not None and asked is not None and named != asked:
            raise DataError(
                f"{where}: id {row['id']!r} is that of row {named}, and `{self.columns[0]}` that of row {asked}. "
                "Rows count from 0; mend the id or leave it out."
            )
        number = asked if named is None else named
        if number is None:
            wanted = " and ".join(f"`{column}`" for column in self.columns)
            raise DataError(f"{where}: found {', '.join(map(repr, row))}, expected `id` or {wanted} to say which example it is.")
        return number

    def _find_id(self, name: Any, where: str) -> int:
        if isinstance(name, str | int) and not isinstance(name, bool) and str(name) in self.numbers:
            return self.numbers[str(name)]
        near = difflib.get_close_matches(str(name)[:100], self.numbers, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{where}: id {name!r} matches no example; an example is known by {self.expected}.{hint}")

    def _find_prompt(self, row: Mapping[str, Any], where: str) -> int:
        number = self.prompts.get(self._prompt(row))
        if number is None:
            raise DataError(
                f"{where}: `{self.columns[0]}` {str(row[self.columns[0]])[:60]!r} matches no example. Check that task and split "
                "are those that were answered."
            )
        return number

    def _prompt(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(column)).strip() for column in self.columns)
