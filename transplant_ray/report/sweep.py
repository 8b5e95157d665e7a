"""A finished sweep as its run folder tells it: tables, summary, recipe, what was changed, which examples flipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transplant_ray.errors import RunError
from transplant_ray.evaluate.example import Split
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.report.flips import Flips, find_flips
from transplant_ray.report.records import Answer, Asked, GuardRow, Row, Score, read_records, with_label
from transplant_ray.storage import RunFolder
from transplant_ray.tables import read_rows

EXPORTED = "exported"
"""The name under which a sweep keeps the outcomes of the exported checkpoint."""


@dataclass(frozen=True)
class Sweep:
    """Everything that the report tells. What the folder does not have is empty or None."""

    name: str
    summary: Mapping[str, Any]
    recipe: Mapping[str, Any]
    recipe_text: str
    table: Sequence[Mapping[str, Any]]
    """results.parquet as it is, with columns of any version."""
    rows: Sequence[Row]
    scores: Mapping[str, Sequence[Score]]
    """By ranker, best first."""
    guards: Sequence[GuardRow]
    coefficients: Mapping[str, Any]
    """Of the winner: module → number, or one per output channel."""
    flips: Flips | None

    def on(self, split: Split) -> list[Row]:
        return [row for row in self.rows if row.split == split]

    def baseline(self, role: str, split: Split) -> Row | None:
        """The target, the source or all swapped; None where it is not there or failed."""
        return next((row for row in self.on(split) if row.role == role and row.measured), None)

    @property
    def winner(self) -> Row | None:
        """On test where it was confirmed there, else on select."""
        won = [row for row in self.rows if row.winner]
        return max(won, key=lambda row: row.split == "test", default=None)

    @property
    def twins(self) -> list[str]:
        """Labels of controls that hold the very modules of the winner."""
        return self.listed("winner", "same_as")

    def listed(self, *keys: str) -> list[str]:
        """A list of texts in the summary; empty where there is none."""
        found = self.told(*keys)
        return [str(item) for item in found] if isinstance(found, list) else []

    def told(self, *keys: str) -> Any:
        """What the summary says under these keys; None where it says nothing."""
        return dig(self.summary, *keys)


def read_sweep(folder: RunFolder) -> Sweep:
    """RunError where the folder, its results or its summary are missing, or a file is damaged."""
    summary = folder.read_summary()
    table, rows = read_table(folder)
    recipe, recipe_text = _recipe(folder.recipe)
    won = {row.split: row.variant for row in rows if row.winner}
    return Sweep(
        name=str(summary.get("name") or folder.path.name),
        summary=summary,
        recipe=recipe,
        recipe_text=recipe_text,
        table=table,
        rows=rows,
        scores=read_scores(folder.rankings),
        guards=read_records(GuardRow, _rows(folder.guards), folder.guards),
        coefficients=_coefficients(folder) if won else {},
        flips=_flips(folder, won),
    )


def read_table(folder: RunFolder) -> tuple[list[Mapping[str, Any]], list[Row]]:
    """results.parquet as it is, and as rows."""
    table = [with_label(row) for row in read_rows(folder.require(folder.results))]
    return table, read_records(Row, table, folder.results)


def read_scores(path: Path) -> dict[str, list[Score]]:
    """Rankings by ranker; none where the table is not there."""
    scores: dict[str, list[Score]] = {}
    for score in read_records(Score, _rows(path), path):
        scores.setdefault(score.ranker, []).append(score)
    return scores


def dig(value: Any, *keys: str) -> Any:
    """What is nested under these keys; None where something on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _rows(path: Path, filters: Sequence[tuple[str, str, Any]] | None = None) -> list[dict[str, Any]]:
    return read_rows(path, filters) if path.exists() else []


def _recipe(path: Path) -> tuple[Mapping[str, Any], str]:
    """Read without checks: an old recipe may have keys that today's version refuses, and still says what was done."""
    if not path.exists():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not a readable recipe ({error}). Run the sweep again.") from error
    if not isinstance(recipe, dict):
        raise RunError(f"{path}: found {type(recipe).__name__}, expected a mapping. Run the sweep again.")
    return recipe, text


def _coefficients(folder: RunFolder) -> Mapping[str, Any]:
    """Of the winner, from what was exported with it."""
    path = folder.delta / "variant.json"
    if not path.exists():
        return {}
    try:
        found = dig(json.loads(path.read_text(encoding="utf-8")), "coefficients")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable variant ({error}). Export the winner again.") from error
    if not isinstance(found, dict) or not all(_is_coefficient(value) for value in found.values()):
        raise RunError(f"{path}: has no `coefficients` that are numbers, or lists of them. Export the winner again.")
    return found


def _is_coefficient(value: Any) -> bool:
    return all(isinstance(c, int | float) for c in value) if isinstance(value, list) and value else isinstance(value, int | float)


def _flips(folder: RunFolder, won: Mapping[Split, str]) -> Flips | None:
    """On test, of the exported checkpoint; on select where there is no test; None where nobody kept the answers."""
    tries: tuple[tuple[Split, str | None], ...] = (("test", EXPORTED if "test" in won else None), ("select", won.get("select")))
    for split, winner in tries:
        path = folder.outcomes / f"{split}.parquet"
        if winner is None or not path.exists():
            continue
        answers = read_records(Answer, _rows(path, [("variant", "in", [ORIGIN.id, winner])]), path)
        asked = _rows(folder.examples, [("split", "==", split)])
        found = find_flips(split, answers, ORIGIN.id, winner, read_records(Asked, asked, folder.examples))
        if found is not None:
            return found
    return None
