"""`transplant-ray organ …`: layers out of a model, trained by themselves, into another, and out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transplant_ray.cli_organ_compare import compare
from transplant_ray.cli_organ_demo import demo
from transplant_ray.cli_organ_sweep import sweep
from transplant_ray.errors import OrganError
from transplant_ray.terminal import loading, resumable

organ_app = typer.Typer(
    help="Cut contiguous layers out of a model, put them into another, and take them out again.", no_args_is_help=True
)
console = Console(emoji=False)

Out = Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")]


@organ_app.command()
def extract(
    model: Annotated[str, typer.Option(help="The model to cut the layers out of: folder or hub id.")],
    out: Out,
    layers: Annotated[
        str,
        typer.Option(
            help="First and last layer, such as 4-6: counted from 0, both taken. Or one, such as 4. Or `default`: three from ⌊L/3⌋."
        ),
    ] = "default",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the model, e.g. apache-2.0; by default what its card says.")
    ] = None,
) -> None:
    """Cut contiguous layers out of a model and write them as an organ: a folder that can be given away."""
    from transplant_ray.pipeline.organs import extract as run_extract

    organ = run_extract(model, layers, out, revision=revision, licence=licence)
    _print(f"wrote {out}: organ {organ.manifest.id}, layers {organ.manifest.layers} of {organ.manifest.source.num_layers}")


@organ_app.command()
def insert(
    recipient: Annotated[str, typer.Option(help="The model to put organs into: folder or hub id.")],
    organ: Annotated[list[Path], typer.Option(help="Organ folder; may be repeated, each with its --at.")],
    at: Annotated[
        list[int],
        typer.Option(
            help="Layer of the recipient, as it is before anything is put in and counted from 0, that the organ comes before (its "
            "number of layers: at the end), or from which on it replaces layers. One for each --organ, in their order."
        ),
    ],
    out: Out,
    mode: Annotated[
        str, typer.Option(help="`insert`: the recipient keeps its layers and grows; `replace`: as many layers are replaced.")
    ] = "insert",
    vocabulary: Annotated[
        str, typer.Option(help="Where the organ has seen another vocabulary: `refuse`, or `warn` and put it in all the same.")
    ] = "refuse",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub recipient.")] = None,
) -> None:
    """Put organs into a recipient and write a checkpoint that loads anywhere."""
    from transplant_ray.pipeline.organs import insert as run_insert

    if len(organ) != len(at):
        raise OrganError(f"{len(organ)} organs and {len(at)} positions. Give --at once for each --organ.")
    insertion = run_insert(recipient, list(zip(organ, at, strict=True)), out, mode=mode, vocabulary=vocabulary, revision=revision)
    for warning in insertion.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    _print(f"wrote {out}: {len(insertion.layers)} layers, the recipient has {len(insertion.stack.layers)}")


@organ_app.command()
def train(
    model: Annotated[str, typer.Option(help="The model whose embedding and head the layers are trained in: folder or hub id.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text: a .jsonl or .parquet file, a plain text file, a folder of them, a pattern such as 'docs/**/*.md', or "
            "'hub:NAME?split=train' (also name=, revision=). May be repeated."
        ),
    ],
    out: Out,
    layers: Annotated[str, typer.Option(help="Layers of the model to train, as `organ extract` takes them.")] = "default",
    organ: Annotated[Path | None, typer.Option(help="An organ to train instead, cut out before.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the training: text, context, steps or tokens, batch, lr, seed, …"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the batch.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, max=1, help="GPUs of each of them.")] = 0,
    cpus: Annotated[int | None, typer.Option(min=1, help="Threads of each of them; by default all that there are.")] = None,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster; by default Ray starts here.")] = None,
    tracking: Annotated[str, typer.Option(help="MLflow server or database that gets the curves; `none` for no MLflow.")] = (
        "sqlite:///mlflow.db"
    ),
    vocabulary: Annotated[
        str, typer.Option(help="Where the organ has seen another vocabulary: `refuse`, or `warn` and train it all the same.")
    ] = "refuse",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the model, where layers are cut out of it.")] = None,
) -> None:
    """Train layers by themselves on text, and write them as an organ. Run again after it was stopped, it goes on."""
    from transplant_ray.recipe import TrackingSpec, WorkerSpec, parse_training

    training = parse_training(data, set or [])
    crew = WorkerSpec(address=address, num=workers, gpus=gpus, cpus=cpus)
    told = None if tracking == "none" else TrackingSpec(uri=tracking, experiment="organs")
    with loading():
        from transplant_ray.console import TerminalWatch
        from transplant_ray.pipeline.organ_training import describe_training
        from transplant_ray.pipeline.organ_training import train as run_train

    with resumable("the same command goes on from the last checkpoint"), TerminalWatch(console) as watch:
        trained = run_train(
            model, training, out, layers=layers, organ=organ, revision=revision, vocabulary=vocabulary, licence=licence,
            workers=crew, tracking=told, watch=watch,
        )  # fmt: skip
    for line in describe_training(trained):
        _print(line)
    _print(f"wrote {out}: organ {trained.organ.manifest.id}, layers {trained.organ.manifest.layers}")
    if trained.refused:
        raise typer.Exit(1)  # what MLflow refused was said when the training ended


organ_app.command()(sweep)
organ_app.command()(compare)
organ_app.command()(demo)


@organ_app.command()
def remove(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that `organ insert` wrote.")],
    out: Out,
) -> None:
    """Take out what `organ insert` put in: the recipient as it was, byte for byte."""
    from transplant_ray.pipeline.organs import remove as run_remove

    _print(f"wrote {run_remove(model, out)}")


@organ_app.command()
def show(organ: Annotated[Path, typer.Argument(metavar="ORGAN", help="Organ folder.")]) -> None:
    """Hold an organ against its hashes and say what it is."""
    from transplant_ray.pipeline.organs import describe

    for name, fact in describe(organ).items():
        _print(f"{name:<12} {fact}")


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
