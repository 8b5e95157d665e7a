"""What the stages of one run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transplant_ray.distributed.actors import Workload
from transplant_ray.distributed.cluster import refuse_vanishing_paths
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import Result, make_result
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.models.catalogue import Module
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.pipeline.watch import Silent, Stopwatch, Watch
from transplant_ray.recipe import Recipe
from transplant_ray.storage import RunFolder


@dataclass(frozen=True)
class Run:
    job: Job
    folder: RunFolder
    stopwatch: Stopwatch
    answers: Answers = field(default_factory=Answers)

    @property
    def modules(self) -> Mapping[str, Module]:
        return {module.name: module for module in self.job.comparison.modules}

    @property
    def workload(self) -> Workload:
        recipe = self.job.recipe
        threads = max(1, int(recipe.resources.cpus_per_model))
        return Workload(
            tokenizer=self.job.comparison.target,
            dtype=recipe.resources.dtype,
            num_gpus=recipe.resources.gpus_per_model,
            num_threads=threads,
            generation=self.job.generation,
            scorer=self.job.scorer,
        )

    def is_complete(self, variant: str) -> bool:
        """Whether a variant has answered all of select, or failed."""
        tally = self.answers.tallies["select"].get(variant)
        return tally is not None and (tally.n == len(self.job.examples["select"]) or tally.error is not None)

    def take(self, split: Split, shard: VariantShard) -> None:
        """Keep what an evaluator found."""
        self.answers.add(split, shard)
        self.stopwatch.watch.advance(len(shard.outcomes))
        for note in shard.notes:
            self.stopwatch.watch.note(note)

    def row(self, entry: Planned, split: Split, tally: Tally) -> Result:
        """The results row of a planned variant, against the baselines on the examples that it has answered."""
        examples = {example.id for example in self.job.examples[split][: tally.n]}
        target, source = (self.answers.baseline(split, name, examples) for name in (ORIGIN.id, "source"))
        return make_result(entry, tally, split, self.modules, target=target, source=source)


def begin(recipe: Recipe, watch: Watch | None) -> Run:
    """Refuse what can be refused before anything starts; nothing is written yet."""
    refuse_vanishing_paths(recipe)
    stopwatch = Stopwatch(watch or Silent())
    with stopwatch.stage("prepare"):
        job = prepare(recipe)
        folder = RunFolder.of(recipe.storage, recipe.name)
        folder.check_owner(recipe.identity())
    for warning in job.comparison.warnings:
        stopwatch.watch.note(f"warning: {warning}")
    return Run(job, folder, stopwatch)
