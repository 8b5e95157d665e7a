"""`export` and `apply`: from a run to a checkpoint, and from a delta to a checkpoint and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transplant_ray.errors import RunError
from transplant_ray.evaluate.results import Result
from transplant_ray.files import write_text
from transplant_ray.graft.card import write_card
from transplant_ray.graft.export import apply_delta, export_checkpoint, export_delta
from transplant_ray.graft.mergekit import variant_yaml
from transplant_ray.graft.variant import Variant, read_variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.recipe import Recipe, load_recipe
from transplant_ray.storage import RunFolder
from transplant_ray.tables import read_rows


def export(run: str | Path, variant: str | None = None, out: str | Path | None = None, format: str = "checkpoint") -> Path:
    """Write a variant of a finished sweep, the winner by default, as a checkpoint folder or a YAML for mergekit; returns the path.

    Nothing is loaded but the changed tensors. RunError where the run, the variant or the format is not there, or `out` exists.
    """
    write = FORMATS.get(format)
    if write is None:
        raise RunError(f"format {format!r}: expected one of {', '.join(FORMATS)}.")
    folder = RunFolder.open(str(run))
    recipe = load_recipe(folder.require(folder.recipe))
    comparison = compare_models(recipe)
    rows = _find(read_results(folder), variant or _winner(folder))
    found = Found(recipe, comparison, _read_variant(folder, rows[0].variant), rows)
    return write(folder, found, None if out is None else Path(out))


@dataclass(frozen=True)
class Found:
    """A variant of a run, with what was measured of it."""

    recipe: Recipe
    comparison: Comparison
    variant: Variant
    rows: Sequence[Result]


def _write_checkpoint(folder: RunFolder, found: Found, out: Path | None) -> Path:
    place = out or folder.path / f"checkpoint-{found.variant.id}"
    card = make_card(found.recipe, found.comparison, found.variant, found.rows)
    return export_checkpoint(found.comparison, found.variant, place, card)


def _write_mergekit(folder: RunFolder, found: Found, out: Path | None) -> Path:
    place = out or folder.path / f"mergekit-{found.variant.id}.yaml"
    text = variant_yaml(found.comparison, found.variant)
    if place.exists():
        raise RunError(f"{place}: is there already. Choose another place, or move it away; nothing was written.")
    write_text(place, text)
    return place


FORMATS: Mapping[str, Callable[[RunFolder, Found, Path | None], Path]] = MappingProxyType(
    {"checkpoint": _write_checkpoint, "mergekit": _write_mergekit}
)


def apply(delta: str | Path, target: str, out: str | Path, *, undo: bool = False, revision: str | None = None) -> Path:
    """Turn `target` into the variant of a delta folder, or with `undo` turn that variant back into the target, byte for byte."""
    return apply_delta(Path(delta), target, Path(out), undo=undo, revision=revision)


def show(run: str | Path) -> tuple[list[Result], dict[str, Any]]:
    """Rows of results.parquet and the summary of a finished run. RunError where it is not there."""
    folder = RunFolder.open(str(run))
    return read_results(folder), folder.read_summary()


def export_winner(recipe: Recipe, comparison: Comparison, variant: Variant, rows: Sequence[Result], folder: RunFolder) -> None:
    """The run's own `checkpoint/` and `delta/`; those of an earlier try are replaced."""
    card = make_card(recipe, comparison, variant, rows)
    export_checkpoint(comparison, variant, folder.checkpoint, card, replace=True)
    export_delta(comparison, variant, folder.checkpoint, folder.delta, replace=True)


def write_winner_card(recipe: Recipe, comparison: Comparison, variant: Variant, rows: Sequence[Result], folder: RunFolder) -> None:
    """The card again, now that the exported checkpoint was measured."""
    for place in (folder.checkpoint, folder.delta):
        write_text(place / "README.md", make_card(recipe, comparison, variant, rows))


def make_card(recipe: Recipe, comparison: Comparison, variant: Variant, rows: Sequence[Result]) -> str:
    """`rows` are what was measured of the variant, one or more."""
    return write_card(f"{recipe.name}: {rows[0].label}", comparison, variant, make_card_table(rows))


def make_card_table(rows: Sequence[Result]) -> list[dict[str, str]]:
    """A line per row, all with the same columns."""
    losses = any(row.accuracy is None and row.score is not None for row in rows)
    return [_card_row(row, "loss" if losses else "accuracy") for row in rows]


def compare_models(recipe: Recipe) -> Comparison:
    source = open_checkpoint(recipe.source.model, recipe.source.revision, accept=recipe.accept)
    return compare(source, open_checkpoint(recipe.target.model, recipe.target.revision, accept=recipe.accept))


def read_results(folder: RunFolder) -> list[Result]:
    """Runs of before there were losses have accuracies alone."""
    rows = read_rows(folder.require(folder.results))
    return [Result(**{**row, "score": row.get("score", row["accuracy"])}) for row in rows]


def _find(results: Sequence[Result], variant: str) -> list[Result]:
    """The rows of a variant, by the first role that it has in the plan; several points of the grid may be the same variant."""
    grafted = [row for row in results if row.role not in ("source", "target")]
    role = next((row.role for row in grafted if row.variant == variant), None)
    if role is None:
        near = difflib.get_close_matches(variant, [row.variant for row in grafted], n=1)
        hint = f" Did you mean {near[0]}?" if near else " `show RUN` lists them."
        raise RunError(f"variant {variant!r}: not one that this run grafted.{hint}")
    return [row for row in grafted if (row.variant, row.role) == (variant, role)]


def _read_variant(folder: RunFolder, id: str) -> Variant:
    variant = read_variant(read_rows(folder.require(folder.variants)), id)
    if variant.id != id:
        raise RunError(f"{folder.variants}: does not hold variant {id} as it was measured. Run the sweep again.")
    return variant


def _winner(folder: RunFolder) -> str:
    winner = folder.read_summary().get("winner")
    if winner is None:
        raise RunError(f"{folder.path}: this sweep has no winner; its summary says why. Choose one with --variant.")
    return str(winner["variant"])


def _card_row(row: Result, measure: str) -> dict[str, str]:
    interval = "–" if row.ci_low is None else f"{row.ci_low:.3f}–{row.ci_high:.3f}"
    numbers = {measure: row.value, "TIR": row.tir, "Recovery": row.recovery}
    shown = {name: "–" if value is None else f"{value:.3f}" for name, value in numbers.items()}
    return {"split": row.split, "n": str(row.n), measure: shown.pop(measure), "interval": interval, **shown}
