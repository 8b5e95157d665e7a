"""Merging baselines: task arithmetic, TIES and DARE around a base model.

They change embeddings and norms too, so they are no variants: each is a checkpoint that is made, loaded by itself, asked on select,
and removed again. A merge never wins; it is a control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from transplant_ray.distributed.cluster import Capacity, plain_errors
from transplant_ray.distributed.probing import Asked, Said
from transplant_ray.errors import TransplantError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.results import Result
from transplant_ray.files import PART, write_text
from transplant_ray.graft.mergekit import config_yaml, find_mergekit, merge_config, run_mergekit
from transplant_ray.graft.merges import merge_name, planned_merges
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.task_arithmetic import num_merged_parameters, write_task_arithmetic
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.compare import Comparison
from transplant_ray.models.writing import copy_companions
from transplant_ray.pipeline.asking import ask_alone
from transplant_ray.pipeline.evaluating import Evaluation
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import SPARSE_MERGES


def evaluate_merges(evaluation: Evaluation, capacity: Capacity) -> list[Result]:
    """A row on select for every merge of the recipe. One that cannot be made or loaded is a row with its reason."""
    run = evaluation.run
    merges, base = planned_merges(run.job.recipe.sweep.controls), run.job.base
    if base is None or not merges:
        return []
    asked = run.asked(["select"])
    with run.stopwatch.stage("merges", len(merges) * sum(len(one.examples) for one in asked)):
        for planned in merges:
            for one, shard in _answered(run, planned, base, asked, capacity):
                run.take(one.task, one.split, shard)
    num_parameters = num_merged_parameters(run.job.comparison, base)
    rows = [evaluation.row(planned) for planned in merges]
    return [
        replace(row, num_modules=len(run.modules), num_parameters=num_parameters, size=None, moved=None, kl=None) for row in rows
    ]


def _answered(run: Run, planned: Planned, base: Comparison, asked: Sequence[Asked], capacity: Capacity) -> Said:
    """Made in the run's own folder, which all nodes see, under a name by which it is known as debris where this is killed."""
    name = merge_name(planned)
    try:
        with TemporaryDirectory(prefix=f".merge-{name}.", suffix=PART, dir=run.folder.path) as folder, plain_errors():
            place = Path(folder) / name
            WRITERS[str(planned.ranker)](run, planned, base, place)
            made = open_checkpoint(str(place), accept=run.job.recipe.accept)
            return ask_alone(run, made, planned.id, asked, capacity)
    except (TransplantError, RuntimeError, OSError) as error:  # torch reports what a device cannot do as RuntimeError
        return [(one, VariantShard(planned.id, (), 0.0, f"{type(error).__name__}: {error}")) for one in asked]


def _task_arithmetic(run: Run, planned: Planned, base: Comparison, out: Path) -> None:
    out.mkdir()
    write_task_arithmetic(run.job.comparison, base, planned.alpha or 0, out)


def _by_mergekit(run: Run, planned: Planned, base: Comparison, out: Path) -> None:
    """Its YAML stays in the run folder. Config and tokenizer are the target's, as with every variant."""
    program = find_mergekit()
    assert program is not None, "prepare has looked"
    pair, density = run.job.comparison, run.job.recipe.sweep.controls.density
    start, target, source = (_fetched(model) for model in (base.source, pair.target, pair.source))
    recipe = run.folder.path / "merges" / f"{out.name}.yaml"
    write_text(recipe, config_yaml(merge_config(str(planned.ranker), start, [target, source], planned.alpha or 0, density)))
    options = ["--trust-remote-code"] if target.remote_code else []
    run_mergekit(program, recipe, out, seed=planned.seed or 0, options=options)
    copy_companions(target, out)


def _fetched(model: Checkpoint) -> Checkpoint:
    """Where its files are, so that mergekit asks no hub."""
    return replace(model, folder=model.fetch())


WRITERS: Mapping[str, Callable[[Run, Planned, Comparison, Path], None]] = MappingProxyType(
    {"task_arithmetic": _task_arithmetic, **dict.fromkeys(SPARSE_MERGES, _by_mergekit)}
)
