"""`transplant-ray organ compare`: organs, LoRA and full fine-tuning, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from transplant_ray.terminal import loading, resumable, tell

if TYPE_CHECKING:
    from transplant_ray.pipeline.comparison_planning import Planned
    from transplant_ray.recipe import CompareRecipe

console = Console(emoji=False)


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe of a comparison.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. seeds=[0,1].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and say what would be trained; nothing is written.")
    ] = False,
) -> None:
    """Compare organs with LoRA and full fine-tuning: the same data, tokens and tuning for each. Run again, it goes on.

    Ends with 1 where a method or a seed has no result. A learning rate that diverges is a result: a row with its reason.
    """
    from transplant_ray.recipe import load_compare_recipe

    loaded = load_compare_recipe(recipe, overrides or [])
    with loading():
        from transplant_ray.console import TerminalWatch
        from transplant_ray.pipeline.comparing import compare as run_compare
        from transplant_ray.pipeline.comparison_planning import plan

    if dry_run:
        _print_plan(loaded, plan(loaded))
        return
    with resumable("the same command goes on where it stopped"), TerminalWatch(console) as watch:
        compared = run_compare(loaded, watch)
    print_comparison(console, compared.summary)
    _print(f"results: {compared.folder.path}   report: {compared.folder.report}")
    _print(f"MLflow: experiment {loaded.tracking.experiment!r}, run {compared.summary['mlflow_run']}")
    if compared.refused:
        tell(f"MLflow refused {len(compared.refused)} of its entries, the first: {compared.refused[0]}")
    if compared.missing:
        tell(f"without a result: {'; '.join(compared.missing)}. The report says why.")
    if compared.missing or compared.refused:
        raise typer.Exit(1)


def print_comparison(console: Console, summary: Mapping[str, Any]) -> None:
    from transplant_ray.report.comparison import budget

    for model in summary["models"]:
        console.print(_table(summary, model))
    for line in (budget(summary), *(f"- {line}" for line in summary["said"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(summary: Mapping[str, Any], model: str) -> Table:
    """In 80 columns: an interval is below its number, and where organs were put in is a line of its own."""
    from transplant_ray.report.comparison import COLUMNS, method_rows

    table = Table(title=Text(f"{model}: perplexity on test"), title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.padding, table.show_edge = False, 0, False
    shown = [number for number, column in enumerate(COLUMNS) if column not in ("model", "× before", "put in")]
    for number in shown:
        # Where there is no room, the ends of an interval go below each other.
        wide = COLUMNS[number] in {"domain", "general", "training"}
        table.add_column(COLUMNS[number], justify="left" if number == 1 else "right", no_wrap=not wide)
    rows = [row for row in method_rows(summary) if row[0] == model]
    for row in rows:
        table.add_row(*(Text(_narrow(row[number])) for number in shown))
    notes = [f"{row[1]} put in: {row[-1]}" for row in rows if row[-1]]
    notes += ["* the edge of the grid"] if any("(edge)" in row[2] for row in rows) else []
    table.caption = Text("below: 95 % intervals over seeds" + "".join(f"; {note}" for note in notes))
    return table


def _narrow(cell: str) -> str:
    """`828.4 [812, 853.6]` in two lines, and the edge as a star."""
    return cell.replace(" (edge)", "*").replace(" [", "\n").replace(", ", " – ").removesuffix("]")


def _print_plan(recipe: CompareRecipe, planned: Sequence[Planned]) -> None:
    rates, seeds = len(recipe.tune.lr), len(recipe.seeds)
    for each in planned:
        _print(f"{each.model}: {each.recipient.model}, {each.recipient.num_parameters:,} parameters")
        for method in recipe.methods.wanted:
            layers = f", layers {each.layers[method]}" if method in each.layers else ""
            _print(f"  {method:<9} {rates} trainings to tune (seed {recipe.tune.seed}), {seeds} to confirm{layers}")
        _print(f"  {each.trainings} trainings of {each.tokens:,} tokens ({each.steps:,} steps); {each.measurings} measurings")
    total = sum(each.trainings * each.tokens for each in planned)
    _print(f"in all {sum(each.trainings for each in planned)} trainings, {total:,} tokens. Nothing was written.")
    _print("How long that takes depends on the machine and is not known before the first training.")


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
