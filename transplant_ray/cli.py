"""The command line: parse, call one function, print.

Exit codes: 0 well, 1 some variants (of a comparison: methods or seeds) failed or MLflow refused something, 2 nothing could be done,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from transplant_ray import zoo
from transplant_ray.cli_organ import organ_app
from transplant_ray.cli_organ_compare import print_comparison
from transplant_ray.cli_organ_sweep import print_organs
from transplant_ray.errors import TransplantError
from transplant_ray.named_tasks import NAMED_TASKS
from transplant_ray.terminal import INTERRUPTED, complaints, loading, resumable, tell

app = typer.Typer(
    help="Find the modules whose weights bring a lost ability back to a language model, transplant them, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(organ_app, name="organ")
console = Console(emoji=False)  # `:a:` in a path or a pattern is no picture

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe; see jobs/recipes.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run folder or address, e.g. runs/cross-generation.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. sweep.k=[1,2].")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Dashboard of the head, e.g. http://HEAD:8265. By default RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else the Ray on "
        "this machine. A cluster with tokens needs RAY_AUTH_MODE=token and its token in ~/.ray/auth_token.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Submission id, as `submit` and `status` print it.")]


@app.command()
def demo(
    pair: Annotated[str, typer.Argument(help=f"Pair of the zoo: {', '.join(zoo.PAIRS)}.")] = zoo.PAIRS[0],
    overrides: Overrides = None,
) -> None:
    """Sweep a small trained pair that ships with the package: two minutes on a laptop."""
    if "=" in pair:  # only overrides were given
        pair, overrides = zoo.PAIRS[0], [pair, *(overrides or [])]
    _sweep(zoo.recipe_path(pair), overrides)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option(help="Load the pair, run a few steps, and tell how long the sweep takes.")] = False,
) -> None:
    """Say what a sweep would do, from configs and headers alone: modules, exclusions, variants, memory, placement."""
    loaded = _load(recipe, overrides)
    with loading():
        from transplant_ray.console import print_calibration, print_plan
        from transplant_ray.pipeline.job import prepare
        from transplant_ray.pipeline.planning import make_plan
        from transplant_ray.pipeline.planning import measure as calibrate

    job = prepare(loaded)
    print_plan(console, make_plan(job))
    if measure:
        print_calibration(console, calibrate(job), gpu=loaded.resources.gpus_per_model > 0)


@app.command()
def rank(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure both models and rank their modules; writes rankings.parquet."""
    loaded = _load(recipe, overrides)
    with loading():
        from transplant_ray.console import TerminalWatch, ranking_table
        from transplant_ray.pipeline.sweeping import rank as run_rank

    with resumable("ranking starts over"), TerminalWatch(console) as watch:
        rankings = run_rank(loaded, watch)
    for ranking in rankings:
        console.print(ranking_table(ranking))


@app.command()
def sweep(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Rank, transplant, evaluate, choose, export and confirm; results in the run folder and in MLflow."""
    _sweep(recipe, overrides)


@app.command()
def export(
    run: RunPath,
    variant: Annotated[str | None, typer.Option(help="Variant id of the results table; the winner by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Place to write; in RUN, named for the variant, by default.")] = None,
    format: Annotated[
        str,
        typer.Option(help="`checkpoint`, a folder that loads anywhere; or `mergekit`, a YAML that `mergekit-yaml` makes it from."),
    ] = "checkpoint",
) -> None:
    """Write a variant of a finished sweep as a checkpoint, or as a recipe for mergekit."""
    from transplant_ray.pipeline.exporting import export as run_export

    console.print(f"wrote {run_export(run, variant, out, format)}", markup=False, soft_wrap=True)


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Delta folder that a sweep wrote.")],
    target: Annotated[str, typer.Option(help="The checkpoint to change: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub target.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Turn a changed checkpoint back into the target, byte for byte.")] = False,
) -> None:
    """Turn a delta and its target into a checkpoint, or back."""
    from transplant_ray.pipeline.exporting import apply as run_apply

    console.print(f"wrote {run_apply(delta, target, out, undo=undo, revision=revision)}", markup=False, soft_wrap=True)


@app.command()
def show(run: RunPath, every: Annotated[bool, typer.Option("--all", help="Every row of every split.")] = False) -> None:
    """Print the results of a finished sweep or comparison again."""
    from transplant_ray.pipeline.exporting import show as run_show
    from transplant_ray.pipeline.reporting import show_comparison, show_organs

    if (compared := show_comparison(run)) is not None:
        print_comparison(console, compared)
        return
    if (organs := show_organs(run)) is not None:
        print_organs(organs.rows, organs.summary)
        return
    _print_results(*run_show(run), every=every)


@app.command()
def report(run: RunPath) -> None:
    """Make the report of a finished sweep or comparison again: report.html, and its table as CSV and LaTeX."""
    from transplant_ray.pipeline.reporting import report as run_report

    console.print(f"wrote {run_report(run)}", markup=False, soft_wrap=True)


@app.command()
def grade(
    task: Annotated[str, typer.Option(help=f"Named task: {', '.join(NAMED_TASKS)}.")],
    completions: Annotated[
        Path,
        typer.Option(
            help="JSONL, one object a line: `completion`, and `id` or the columns of the prompt. An id is the data's own "
            "`unique_id` or `id`, a row number from 0, or the content hash of our outcomes."
        ),
    ],
    data: Annotated[str | None, typer.Option(help="Local copy of the task, .jsonl or .parquet; the hub's where absent.")] = None,
    scorer: Annotated[str | None, typer.Option(help="Instead of the task's own, e.g. exact or 'regex:answer: (.+)'.")] = None,
    against: Annotated[Path | None, typer.Option(help="Completions to compare with, by a paired test.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL to write: `id`, `correct`, `parsed` of each of COMPLETIONS, in their order.")
    ] = None,
) -> None:
    """Score completions from anywhere, and test whether two files of them differ."""
    from transplant_ray.console import TerminalWatch
    from transplant_ray.pipeline.grading import grade as run_grade
    from transplant_ray.pipeline.grading import report_lines

    with TerminalWatch(console) as watch:
        report = run_grade(task, completions, data=data, scorer=scorer, against=against, out=out, watch=watch)
    for line in [*report_lines(report), *([] if out is None else [f"wrote {out}"])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Address = None,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="VERB",
            help="What the job does with the recipe: `sweep`, `rank`, 'organ sweep' or 'organ compare'. By default what such a "
            "recipe is for: keys tell organ sweeps and comparisons from sweeps.",
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML of a Ray runtime environment, e.g. cluster/runtime-env.yaml: env_vars, pip and so on."
        ),
    ] = None,
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="CPUs that the job's own process reserves.")
    ] = None,
    entrypoint_num_gpus: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="GPUs that the job's own process reserves.")
    ] = None,
    entrypoint_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Custom resource that it reserves, e.g. head=1; may be repeated."),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the job; made of the recipe's by default.")
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="Python on the cluster's nodes, which has the package's dependencies.")
    ] = "python",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the log and end as the job does; or print the id and leave.")
    ] = True,
) -> None:
    """Run a recipe as a job on a Ray cluster: with what it names by relative paths, and with this package, but nothing else.

    Ends with the exit code of the job; 143 where it was stopped.
    Ctrl-C asks whether to stop the job and ends with 130; Ctrl-C again leaves it running.
    """
    from transplant_ray.distributed.sending import attend, send

    job = send(
        recipe, overrides or [], address=address, command=command, runtime_env=runtime_env, num_cpus=entrypoint_num_cpus,
        num_gpus=entrypoint_num_gpus, resources=entrypoint_resource or [], submission_id=submission_id, python=python,
    )  # fmt: skip
    if not wait:
        console.print(job.id, markup=False, highlight=False)
        return
    tell(f"job {job.id} on {job.jobs.address}; results go to {job.results}")
    raise typer.Exit(attend(job.jobs, job.id, _write, _ask, tell))


@app.command()
def status(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Submission id; all jobs by default.")] = None,
    address: Address = None,
) -> None:
    """Say how a submitted job is doing; or list all of them."""
    from transplant_ray.distributed.submission import Jobs

    jobs = Jobs.at(address)
    if id is not None:
        for line in _job_lines(jobs.one(id)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(_jobs_table(jobs.all()))


@app.command()
def logs(
    id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends, and then with its exit code; Ctrl-C leaves it running.")
    ] = False,
    address: Address = None,
) -> None:
    """Print what a submitted job has said."""
    from transplant_ray.distributed.submission import Jobs, Told, exit_code

    jobs = Jobs.at(address)
    if not follow:
        _write(jobs.log(id))
        return
    try:
        raise typer.Exit(exit_code(jobs.follow(id, Told(_write))))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def stop(id: JobId, address: Address = None) -> None:
    """Stop a submitted job and wait until it has ended."""
    from transplant_ray.distributed.submission import Jobs, last_words

    jobs = Jobs.at(address)
    if jobs.one(id).status.is_terminal():
        tell(f"{last_words(jobs.one(id))}; there was nothing to stop")
    else:
        tell(last_words(jobs.stop(id)))


def main() -> None:
    """Entry point: our own errors are printed without a traceback and exit with 2."""
    with _plain_errors():
        app()


def _sweep(path: Path, overrides: list[str] | None) -> None:
    recipe = _load(path, overrides)
    with loading():
        from transplant_ray.console import TerminalWatch
        from transplant_ray.pipeline.sweeping import sweep as run_sweep

    again = "goes on where it stopped" if recipe.ledger else "starts over, for `ledger: false` keeps nothing"
    with resumable(f"the same command {again}"), TerminalWatch(console) as watch:
        result = run_sweep(recipe, watch)
    _print_results(result.results, result.summary, every=False)
    folder = result.folder
    place = folder.public_address or folder.path
    console.print(f"results: {place}   checkpoint: {place}/{folder.checkpoint.name}", markup=False, soft_wrap=True)
    console.print(
        f"MLflow: experiment {recipe.tracking.experiment!r}, run {result.summary['mlflow_run']}",
        markup=False,
        soft_wrap=True,
    )
    if result.refused:
        tell(f"MLflow refused {len(result.refused)} of its entries, the first: {result.refused[0]}. All results are in {place}.")
    if result.failed:
        first = result.failed[0]
        tell(f"{len(result.failed)} failed, the first: {first['label']}: {first['error'].splitlines()[0]}. summary.json has all.")
    if result.failed or result.refused:
        raise typer.Exit(1)


def _load(path: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from transplant_ray.recipe import load_recipe

    return load_recipe(path, overrides or [])


def _print_results(results, summary, *, every: bool) -> None:  # type: ignore[no-untyped-def]
    from transplant_ray.console import results_table, summary_lines, time_line

    for split in ("select", "test") if every else ("select",):
        console.print(results_table(results, split, top=None if every else 8))
    for line in [*summary_lines(summary), *time_line(summary)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ask(question: str) -> bool | None:
    """Yes, no, or nobody there."""
    if not sys.stdin.isatty():
        return None
    try:
        return typer.confirm(question, default=False, err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        return None


def _write(text: str) -> None:
    """A piece of a job's log, as it is."""
    console.file.write(text)
    console.file.flush()


def _jobs_table(jobs) -> Table:  # type: ignore[no-untyped-def]
    table = Table(Column("job", no_wrap=True), "status", "recipe", "started", "took", box=SIMPLE_HEAD)
    for job in jobs:
        table.add_row(str(job.submission_id), str(job.status), (job.metadata or {}).get("recipe", "–"), *_times(job))
    return table


def _job_lines(job) -> list[str]:  # type: ignore[no-untyped-def]
    from transplant_ray.recipe import redact

    started, took = _times(job)
    code = None if job.driver_exit_code is None else str(job.driver_exit_code)
    facts = {"job": job.submission_id, "status": job.status, "started": started, "took": took, "exit code": code}
    message = (job.message or "").partition("\n")[0]  # below that Ray repeats the end of the log
    facts |= {**(job.metadata or {}), "message": redact(message)}
    return [f"{name:<10} {fact}" for name, fact in facts.items() if fact]


def _times(job) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    """When a job started, and how long it has taken so far."""
    if not job.start_time:
        return "–", "–"
    start = datetime.fromtimestamp(job.start_time / 1000, UTC)
    end = datetime.fromtimestamp(job.end_time / 1000, UTC) if job.end_time else datetime.now(UTC)
    return f"{start:%Y-%m-%d %H:%M} UTC", str(end - start).partition(".")[0]


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except TransplantError as error:
        complaints.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
