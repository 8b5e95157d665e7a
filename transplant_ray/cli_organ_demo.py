"""`transplant-ray organ demo`: everything about organs in one command, on a model that it trains itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from transplant_ray.cli_organ_compare import print_comparison
from transplant_ray.cli_organ_sweep import print_organs
from transplant_ray.terminal import loading, resumable, tell

if TYPE_CHECKING:
    from transplant_ray.pipeline.organ_demo import Demo

console = Console(emoji=False)


def demo(
    family: Annotated[str, typer.Option(help="Architecture of the small model: gpt2 or llama.")] = "gpt2",
    seed: Annotated[int, typer.Option(min=0, help="Of the model's first weights, and of the trainings.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for all of it; what is there already is taken.")] = Path("runs/organ-demo"),
    domain: Annotated[
        Path | None,
        typer.Option(
            help="GSM8K's train.jsonl, or the folder that it is in; by default ../shared/data/gsm8k, and made-up problems where "
            "that is not there."
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores to use at a time; by default all that there are.")] = None,
    tracking: Annotated[str, typer.Option(help="MLflow server or database.")] = "sqlite:///mlflow.db",
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A size: layers, width, context, tokens, organ_tokens, contexts, characters, …"),
    ] = None,
) -> None:
    """Train a small model from nothing and three of its layers on domain text, try every position, and compare: ten minutes.

    Nothing is downloaded. Run again, it goes on where it was stopped, and says the results again where all is done.
    """
    from transplant_ray.recipe import TrackingSpec, parse_demo

    spec = parse_demo([f"family={family}", f"seed={seed}", *(set or [])])
    told = TrackingSpec(uri=tracking, experiment="organs")
    with loading():
        from transplant_ray.console import TerminalWatch
        from transplant_ray.pipeline.organ_demo import organ_demo

    with resumable("the same command goes on where it stopped"), TerminalWatch(console) as watch:
        made = organ_demo(spec, out, domain=domain, cpus=cpus, tracking=told, watch=watch)
    _print_demo(made)
    if made.sweep.failed or made.compared.missing:
        raise typer.Exit(1)
    if refused := [*made.sweep.refused, *made.compared.refused]:
        tell(f"MLflow refused {len(refused)} of its entries, the first: {refused[0]}. All results are in {made.folder}.")
        raise typer.Exit(1)


def _print_demo(made: Demo) -> None:
    from transplant_ray.pipeline.demo_models import describe_model
    from transplant_ray.pipeline.organ_training import describe_training

    console.rule("the text", align="left")
    _print(f"general: {made.text.record['general']['documents']:,} {made.text.record['general']['what']}")
    _print(f"domain: {made.text.domain_is}")
    console.rule("the model", align="left")
    for line in describe_model(made.model):
        _print(line)
    console.rule("the organ", align="left")
    for line in describe_training(made.trained):
        _print(line)
    _print(f"organ: {made.folder / 'organ'}")
    console.rule("where it goes", align="left")
    print_organs(made.sweep.results, made.sweep.summary)
    _print(f"results: {made.sweep.folder.path}   report: {made.sweep.folder.report}")
    console.rule("what else would do", align="left")
    print_comparison(console, made.compared.summary)
    _print(f"results: {made.compared.folder.path}   report: {made.compared.folder.report}")
    _print(f"recipes, to be changed and run again: {made.folder / 'sweep.yaml'}, {made.folder / 'compare.yaml'}")


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
