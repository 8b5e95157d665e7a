"""`organ compare`: organs, LoRA and full fine-tuning with the same data, tokens and tuning.

Per model and method the learning rate is chosen on `select` of the domain text, by trainings with a seed of their own; then every
seed is trained at that rate and measured on `test`, once, from what it ships. What came of a training is kept under the content
that it came of, so that the same command goes on where it stopped, and a recipe with one more seed trains that alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transplant_ray.distributed.cluster import connect, plain_errors, refuse_vanishing_paths
from transplant_ray.distributed.lessons import resources_of, tutors
from transplant_ray.distributed.preflight import Needs, make_needs, preflight
from transplant_ray.errors import NumericsError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.organ.lessons import BEFORE
from transplant_ray.pipeline.comparison_lessons import Run, carry_out, confirming, make_bench, make_lesson, tuning
from transplant_ray.pipeline.comparison_planning import most_at_once, open_recipient, plan
from transplant_ray.pipeline.comparison_recording import Compared, record
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.journal import watched
from transplant_ray.pipeline.watch import Watch
from transplant_ray.recipe import CompareRecipe
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.comparison import tracked_comparison

OWNER = "comparison"
"""Of the run folder: any comparison of its name, for lessons are known by their content, and a changed recipe goes on in it."""


def compare(recipe: CompareRecipe, watch: Watch | None = None) -> Compared:
    """Tune, train and measure every method on every model; writes the run folder, its report, and MLflow.

    A training that diverges is a row with its reason, and loses the tuning. NumericsError, after everything else is kept, where all
    of them do. RunError where the folder is another run's.
    """
    refuse_vanishing_paths(recipe)
    checkpoints = {name: open_recipient(recipe, name) for name in recipe.named_models}
    plan(recipe, checkpoints)
    folder = RunFolder.of(recipe.storage, recipe.name)
    needs = _needs(recipe, checkpoints, folder)
    stopwatch, journal = watched(recipe, watch)
    with (
        terminable(),
        folder.claimed(OWNER, recipe.to_yaml()),
        tracked_comparison(recipe, stopwatch.watch.note) as tracker,
        connect(resources_of(recipe.resources)) as capacity,
        journal.kept(folder, "organ compare", stopwatch.watch.hear),
        plain_errors(),
        terminable(),
        tutors(recipe.resources, needs, most_at_once(recipe), stopwatch.watch.note, stopwatch.watch.hear) as gathered,
    ):
        with stopwatch.stage("preflight"):
            preflight(needs, capacity.resources, stopwatch.watch.note)
        run = Run(recipe, folder, stopwatch, tracker, gathered)
        benches = [make_bench(run, name, checkpoint) for name, checkpoint in checkpoints.items()]
        before = carry_out(run, BEFORE, [make_lesson(run, bench, BEFORE, BEFORE) for bench in benches])
        if broken := [learnt for learnt in before if learnt.error is not None]:
            raise NumericsError(f"{broken[0].model}, before anything is trained: {broken[0].error}")
        tuned = carry_out(run, "tune", list(tuning(run, benches)))
        confirmed = carry_out(run, "confirm", list(confirming(run, benches, tuned)))
        compared = record(run, benches, before, tuned, confirmed)
        journal.exit = int(bool(compared.missing or tracker.refused)) if confirmed else 2
    if not confirmed:
        raise NumericsError(
            f"no method has a learning rate that does not diverge: {tuned[0].error} What was tried is in {folder.path}; give "
            "lower rates in `tune.lr`."
        )
    return replace(compared, refused=tracker.refused)


def _needs(recipe: CompareRecipe, checkpoints: Mapping[str, Checkpoint], folder: RunFolder) -> Needs:
    """The run folder above all: packed texts, organs and checkpoints of trainings lie there, for a tutor on whichever node."""
    keys = {name: f"models.{name}" if recipe.models else name for name in checkpoints}
    return make_needs(
        {keys[name]: checkpoint for name, checkpoint in checkpoints.items()},
        Shelf(str(folder.path.absolute())),
        recipe.tracking,
        libraries=() if recipe.methods.lora is None else ("peft",),
    )
