"""`organ sweep`: every organ at every place, on the text that it is for and on other text; which wins, and whether it is real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from transplant_ray.distributed.cluster import plain_errors, refuse_vanishing_paths
from transplant_ray.distributed.facts import Exported, Fact, VariantsPlanned, Winner
from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.organ_choice import Choice, Comparison, choose_trial, compare_blocks, judge
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.grid import Grid, Trial
from transplant_ray.organ.insert import write_insertion
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.journal import Journal, watched
from transplant_ray.pipeline.organ_grid import SIDES, OrganJob, prepared
from transplant_ray.pipeline.organ_measuring import EXPORTED, Measuring, measuring
from transplant_ray.pipeline.organ_recording import Agreement, Confirmed, OrganSweepResult, record
from transplant_ray.pipeline.pace import MODELS
from transplant_ray.pipeline.watch import Silent, Stopwatch, Watch
from transplant_ray.recipe import DOMAIN, GENERAL, OrganRecipe
from transplant_ray.tracking.tracker import tracked


def sweep_organs(recipe: OrganRecipe, watch: Watch | None = None) -> OrganSweepResult:
    """Measure every organ at every place, choose on one half of the text, confirm on the other, and write the winner.

    Raises before anything is started where the recipe cannot work; a trial that fails is a row. Nothing is measured twice.
    """
    refuse_vanishing_paths(recipe)
    stopwatch, journal = watched(recipe, watch)
    with (
        terminable(),
        prepared(recipe, stopwatch) as job,
        tracked(recipe, stopwatch.watch.note) as tracker,
        _claimed(job, journal, stopwatch.watch.hear),
        plain_errors(),
        measuring(job, stopwatch) as measured,
    ):
        with stopwatch.stage("measure on select", job.grid.num_models, MODELS):
            measured.measure(job.grid.trials, "select")
        choice = _choose(measured)
        confirmed = None if choice.winner is None else _confirm(measured, job.grid.trial(choice.winner))
        result = record(measured, choice, confirmed, tracker)
        journal.exit = int(bool(result.failed or tracker.refused))
    return replace(result, refused=tracker.refused)


@contextmanager
def _claimed(job: OrganJob, journal: Journal, tell: Callable[[Fact], None]) -> Iterator[None]:
    """The run folder is this process's alone for the block, and the log in it is kept.

    RunError where another process works in it, or another recipe has it by now.
    """
    with job.folder.claimed(job.recipe.identity(), job.recipe.to_yaml()), journal.kept(job.folder, "organ sweep", tell):
        tell(VariantsPlanned({trial.id: trial.label for trial in reversed(job.grid.trials)}))  # the first of equal ones names them
        yield


def plan_organs(recipe: OrganRecipe, watch: Watch | None = None) -> tuple[Grid, Mapping[str, Mapping[Split, int]]]:
    """The grid and, of each text, its blocks by side: what a sweep would do. Nothing is measured, and nothing stays."""
    with prepared(recipe, Stopwatch(watch or Silent())) as job:
        sides = {name: {split: len(task.examples[split]) for split in SIDES} for name, task in job.asked.items()}
        return job.grid, sides


def _choose(measured: Measuring) -> Choice:
    """NumericsError where the recipient itself cannot be measured: then there is nothing to compare with."""
    grid = measured.job.grid
    if (error := measured.errors.get((grid.recipient.id, "select"))) is not None:
        raise NumericsError(f"{measured.job.recipient.model}: the recipient itself could not be measured: {error}")
    losses = {text: _losses(measured, text) for text in (DOMAIN, GENERAL)}
    choice = choose_trial(
        {trial.label: losses[DOMAIN][trial.id] for trial in grid.of("trial") if trial.id in losses[DOMAIN]},
        {trial.label: losses[GENERAL][trial.id] for trial in grid.of("trial") if trial.id in losses[GENERAL]},
        losses[GENERAL][grid.recipient.id],
        measured.job.recipe.sweep.most_lost,
    )
    if choice.winner is not None:
        winner = grid.trial(choice.winner)
        measured.stopwatch.watch.hear(Winner(winner.label, winner.id, -losses[DOMAIN][winner.id]))
    return choice


def _losses(measured: Measuring, text: str) -> dict[str, float]:
    """Of all that have answered everything."""
    tallies = {
        trial.id: measured.tally(text, "select", trial.id)
        for trial in measured.job.grid.trials
        if (trial.id, "select") not in measured.errors
    }
    return {id: tally.loss for id, tally in tallies.items() if tally is not None and tally.loss is not None}


def _confirm(measured: Measuring, winner: Trial) -> Confirmed:
    """Write the winner, load it by plain transformers, and let it read both halves; beside it the recipient and the control."""
    job, stopwatch = measured.job, measured.stopwatch
    with stopwatch.stage("export"):
        write_insertion(winner.insertion, job.folder.checkpoint, replace_old=True)
    stopwatch.watch.hear(Exported(winner.id, str(job.folder.checkpoint)))
    exported = open_checkpoint(str(job.folder.checkpoint), accept=job.recipe.accept)
    untrained = job.grid.untrained(winner)
    beside = [job.grid.recipient, *([] if untrained is None else [untrained])]
    ids = {name: [example.id for example in task.examples["test"]] for name, task in job.asked.items()}
    opened = job.folder.open_tests(ids, job.recipe.identity())
    with stopwatch.stage("confirm on test", len(beside) + 1, MODELS):
        measured.measure_exported(exported, SIDES)
        stopwatch.watch.advance(1)
        measured.measure(beside, "test")
    return _judged(measured, winner, untrained, opened)


def _judged(measured: Measuring, winner: Trial, untrained: Trial | None, opened: Mapping[str, int]) -> Confirmed:
    job = measured.job
    domain, general = (_compare(measured, text, job.grid.recipient.id, EXPORTED) for text in (DOMAIN, GENERAL))
    control = None if untrained is None else _compare(measured, DOMAIN, untrained.id, EXPORTED)
    verdict = None
    if domain is not None and general is not None:
        why_not = (
            job.grid.without.get(str(winner.organ), "not asked for")
            if untrained is None
            else measured.errors.get((untrained.id, "test"))
        )
        place = f"organ {winner.organ}, {'before' if winner.mode == 'insert' else 'in place of layers from'} layer {winner.at},"
        verdict = judge(place, domain, general, control, why_not)
    return Confirmed(
        winner, untrained, {DOMAIN: domain, GENERAL: general}, control, verdict, _agreement(measured, winner), dict(opened)
    )


def _compare(measured: Measuring, text: str, before: str, after: str) -> Comparison | None:
    """On test; None where one of the two has not answered."""
    first, second = (measured.scores(text, "test", variant) for variant in (before, after))
    return None if first is None or second is None else compare_blocks(-first, -second, measured.job.recipe.sweep.level)


def _agreement(measured: Measuring, winner: Trial) -> Agreement | None:
    """Of the written checkpoint and the resident model, block by block on select."""
    pairs = [(measured.scores(text, "select", winner.id), measured.scores(text, "select", EXPORTED)) for text in (DOMAIN, GENERAL)]
    whole = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(whole) < len(pairs):
        return None
    apart = np.concatenate([np.abs(ours - theirs) for ours, theirs in whole])
    return Agreement(len(apart), int((apart == 0).sum()), float(apart.max()))
