"""`transplant-ray organ sweep`: organs at every place of a recipient, from a recipe or from flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from transplant_ray.errors import RecipeError
from transplant_ray.terminal import loading, resumable, tell

if TYPE_CHECKING:
    from transplant_ray.evaluate.example import Split
    from transplant_ray.evaluate.organ_results import OrganResult
    from transplant_ray.organ.grid import Grid, Role
    from transplant_ray.recipe import OrganRecipe

console = Console(emoji=False)


def sweep(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...", help="YAML recipe of an organ sweep, and changes to it, e.g. sweep.positions=[0,1]."
        ),
    ] = None,
    recipient: Annotated[str | None, typer.Option(help="Without a recipe: the model to put organs into, folder or hub id.")] = None,
    organ: Annotated[list[str] | None, typer.Option(metavar="[NAME=]FOLDER", help="An organ; may be repeated.")] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Text that the organs are for, held out of their training; may be repeated.")
    ] = None,
    general: Annotated[list[str] | None, typer.Option(help="Other text, on which the price is measured; may be repeated.")] = None,
    name: Annotated[str, typer.Option(help="Without a recipe: the name of the run.")] = "organs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, what does not fit and why; measure nothing.")
    ] = False,
) -> None:
    """Measure organs at every place of a recipient, on text that they are for and on other text, and write the best as a model.

    Half of the text chooses the place, the other half confirms it. Run again after it was stopped, it goes on.
    """
    loaded = _load(recipe or [], recipient, organ or [], domain or [], general or [], name)
    with loading():
        from transplant_ray.console import TerminalWatch
        from transplant_ray.pipeline.organ_sweeping import plan_organs, sweep_organs

    if dry_run:
        _print_plan(*plan_organs(loaded))
        return
    again = "goes on where it stopped" if loaded.ledger else "starts over, for `ledger: false` keeps nothing"
    with resumable(f"the same command {again}"), TerminalWatch(console) as watch:
        result = sweep_organs(loaded, watch)
    print_organs(result.results, result.summary)
    place = result.folder.public_address or result.folder.path
    checkpoint = f"   checkpoint: {place}/{result.folder.checkpoint.name}" if result.winner else ""
    _print(f"results: {place}   report: {place}/{result.folder.report.name}{checkpoint}")
    if result.refused:
        tell(f"MLflow refused {len(result.refused)} of its entries, the first: {result.refused[0]}. All results are in the folder.")
    if result.failed or result.refused:
        raise typer.Exit(1)


def _load(
    words: list[str], recipient: str | None, organs: list[str], domain: list[str], general: list[str], name: str
) -> OrganRecipe:
    """The recipe; or one that is made of flags."""
    from transplant_ray.recipe import load_organ_recipe, make_organ_recipe

    flags = [
        flag
        for flag, given in (("--recipient", recipient), ("--organ", organs), ("--domain", domain), ("--general", general))
        if given
    ]
    if words and "=" not in Path(words[0]).name:
        if flags:
            raise RecipeError(f"{flags[0]} has no effect beside the recipe {words[0]}: give KEY=VALUE, e.g. context=256.")
        return load_organ_recipe(words[0], words[1:])
    if recipient is None or not organs or not domain or not general:
        raise RecipeError("give a recipe; or --recipient, --organ, --domain and --general.")
    texts = {"domain": {"data": domain}, "general": {"data": general}}
    settings: dict[str, Any] = {"name": name, "recipient": {"model": recipient}, "organs": _named(organs), **texts}
    return make_organ_recipe(settings, words)


def _named(organs: list[str]) -> dict[str, str]:
    """Those without a name are called by their folders."""
    named: dict[str, str] = {}
    for text in organs:
        name, separator, folder = text.partition("=")
        key = name if separator else Path(text).name
        if key in named:
            raise RecipeError(f"--organ: two are called {key!r}. Give them names: --organ NAME=FOLDER.")
        named[key] = folder if separator else text
    return named


def _print_plan(grid: Grid, blocks: Mapping[str, Mapping[Split, int]]) -> None:
    roles: dict[Role, str] = {
        "recipient": "the recipient",
        "trial": "trials",
        "untrained": "untrained controls",
        "alone": "organs alone",
    }
    counts = ", ".join(f"{len(grid.of(role))} {told}" for role, told in roles.items() if grid.of(role))
    _print(f"models: {counts}; {grid.num_models} different ones to measure")
    for name, sides in blocks.items():
        _print(f"{name}: {', '.join(f'{number} of {side}' for side, number in sides.items())}")
    for trial in grid.of("trial"):
        _print(f"  {trial.label}: {len(trial.insertion.layers)} layers, {trial.num_parameters:,} parameters")
    for organ, why in grid.without.items():
        _print(f"no control for organ {organ}: {why}")
    for misfit in grid.misfits:
        _print(f"does not fit: {misfit.organ} {misfit.mode} {misfit.at}: {misfit.reason}")
    for warning in grid.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def print_organs(rows: Sequence[OrganResult], summary: Mapping[str, Any]) -> None:
    """The table, and the headline in sentences."""
    console.print(_table(rows))
    if verdict := summary["verdict"]:
        _print(f"{verdict['conclusion']}: {verdict['sentence']}")
    elif summary["winner"] is None:
        _print("no winner: no trial answered, or each loses more on general text than `sweep.most_lost`")
    if agrees := (summary["confirmed"] or {}).get("exported_agrees"):
        _print(f"written checkpoint = resident model: the same loss on {agrees['equal']} of {agrees['n']} select blocks")
    if summary["recalled"]:
        _print(f"{summary['recalled']:,} outcomes were taken from the ledger of this storage, {summary['measured']:,} are new")
    _print(f"MLflow: run {summary['mlflow_run']}")


def _table(rows: Sequence[OrganResult]) -> Table:
    """On select, best first, controls dim."""
    shown = sorted(
        (row for row in rows if row.split == "select"),
        key=lambda row: (row.role != "recipient", row.domain_loss is None, row.domain_loss or 0),
    )
    blocks = max((row.domain_n for row in shown), default=0)
    table = Table(
        title=f"perplexity on select, {blocks} blocks of domain text; controls are dim",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("model", "domain", "general", "layers"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in shown:
        if row.error is not None:
            table.add_row(f"{row.label}: {row.error.splitlines()[0][:60]}", "failed", "–", str(row.num_layers), style="red")
            continue
        mark = " *" if row.winner else " (costs too much)" if row.vetoed else ""
        style = "bold green" if row.winner else "bold" if row.role == "recipient" else "" if row.role == "trial" else "dim"
        table.add_row(
            row.label + mark, _number(row.domain_perplexity), _number(row.general_perplexity), str(row.num_layers), style=style
        )
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
