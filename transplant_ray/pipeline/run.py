"""What the stages of one run share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from transplant_ray.distributed.actors import Workload
from transplant_ray.distributed.cluster import Capacity, refuse_vanishing_paths
from transplant_ray.distributed.facts import Fact, VariantFailed, of_shard
from transplant_ray.distributed.preflight import COMPARED, make_needs, preflight
from transplant_ray.distributed.probing import Asked
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.generate import Rules
from transplant_ray.evaluate.ledger import Ledger, page_key
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import Result, make_result
from transplant_ray.evaluate.significance import Scores
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.models.catalogue import Module
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.pipeline.journal import Journal, watched
from transplant_ray.pipeline.watch import Stopwatch, Watch
from transplant_ray.recipe import MAIN, Recipe
from transplant_ray.storage import RunFolder
from transplant_ray.versions import versions


@dataclass(frozen=True)
class Memory:
    """The ledger, and what a run's pages in it are called."""

    ledger: Ledger
    weights: tuple[str, str]
    """Fingerprints of source and target."""
    dtype: str

    def page(self, rules: Rules) -> str | None:
        """Of variants of the pair."""
        return page_key(self.weights, self.dtype, rules)

    def page_alone(self, weights: str, rules: Rules) -> str | None:
        """Of a checkpoint that answers by itself, through the target's tokenizer."""
        return page_key((weights, "read by", self.weights[1]), self.dtype, rules)


@dataclass(frozen=True)
class Run:
    job: Job
    folder: RunFolder
    stopwatch: Stopwatch
    answered: Mapping[str, Answers]
    """What came of every task: the task itself and its guards."""
    journal: Journal
    memory: Memory | None = None
    """What was evaluated before; None where the recipe wants everything measured afresh."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """Of the checkpoints, by folder, as the driver saw them when it looked at the nodes."""

    @property
    def answers(self) -> Answers:
        """To the task itself."""
        return self.answered[MAIN]

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
            run=recipe.name,
            versions=versions(COMPARED),
            samples=self.samples,
        )

    def is_complete(self, variant: str) -> bool:
        """Whether a variant has answered all of select, of the task and of every guard, or failed at one of them."""
        tallies = {name: self.tally(name, "select", variant) for name in self.job.tasks}
        failed = any(tally is not None and tally.error is not None for tally in tallies.values())
        return failed or all(
            tally is not None and tally.n == len(self.job.tasks[name].examples["select"]) for name, tally in tallies.items()
        )

    def tally(self, task: str, split: Split, variant: str) -> Tally | None:
        return self.answered[task].tallies.get(split, {}).get(variant)

    def scores(self, task: str, split: Split, variant: str) -> Scores | None:
        """On each example, in their order, whether it is right, or minus its loss; None where it failed or has not answered all."""
        return self.answered[task].scores(split, variant, [example.id for example in self.job.tasks[task].examples[split]])

    def add(self, task: str, split: Split, shard: VariantShard) -> None:
        """Keep what was found or recalled."""
        self.answered[task].add(split, shard)
        self.tell(of_shard(task, split, shard))
        if shard.error is not None:
            self.tell(VariantFailed(shard.variant, shard.error))

    def take(self, task: str, split: Split, shard: VariantShard) -> None:
        """The same, as a part of the stage that is going on."""
        self.add(task, split, shard)
        self.stopwatch.watch.advance(len(shard.outcomes))
        for note in shard.notes:
            self.stopwatch.watch.note(note)

    def tell(self, fact: Fact) -> None:
        self.stopwatch.watch.hear(fact)

    @contextmanager
    def claimed(self, verb: str) -> Iterator[None]:
        """The run folder is this process's alone for the block, and the log in it is kept; no state of Tune stays.

        RunError where another process works in it, or another recipe has it by now.
        """
        recipe = self.job.recipe
        with self.folder.claimed(recipe.identity(), recipe.to_yaml()):
            shutil.rmtree(self.folder.tune, ignore_errors=True)  # of one that was killed
            with self.journal.kept(self.folder, verb, self.tell):
                try:
                    yield
                finally:
                    shutil.rmtree(self.folder.tune, ignore_errors=True)

    def row(self, entry: Planned, split: Split, tally: Tally) -> Result:
        """The results row of a planned variant, against the baselines on the examples that it has answered."""
        examples = {example.id for example in self.job.examples[split][: tally.n]}
        target, source = (self.answers.baseline(split, name, examples) for name in (ORIGIN.id, "source"))
        decoded = self.job.tasks[MAIN].decodes
        return make_result(entry, tally, split, self.modules, target=target, source=source, decoded=decoded)

    def asked(self, splits: Sequence[Split]) -> list[Asked]:
        """These splits of the task and of its guards, for a model that is loaded by itself."""
        return [Asked(name, split, task.examples[split], task.rules) for name, task in self.job.tasks.items() for split in splits]


def begin(recipe: Recipe, watch: Watch | None) -> Run:
    """Refuse what can be refused before anything starts; nothing is written yet."""
    refuse_vanishing_paths(recipe)
    stopwatch, journal = watched(recipe, watch)
    with stopwatch.stage("prepare"):
        job = prepare(recipe)
        folder = RunFolder.of(recipe.storage, recipe.name)
        folder.check_owner(recipe.identity())
    for warning in job.comparison.warnings:
        stopwatch.watch.note(f"warning: {warning}")
    return Run(job, folder, stopwatch, {name: Answers() for name in job.tasks}, journal)


def check_nodes(run: Run, capacity: Capacity) -> Run:
    """Every node that may be given work shows that it can do it. ResourceError that names those that cannot, and why.

    The run then knows what nodes that come later are held against.
    """
    job, recipe = run.job, run.job.recipe
    base = {} if job.base is None else {"base": job.base.source}
    checkpoints = {"source": job.comparison.source, "target": job.comparison.target, **base}
    needs = make_needs(
        checkpoints,
        run.folder.ledger,
        recipe.tracking,
        scorers=(task.rules.scorer for task in job.tasks.values()),
    )
    with run.stopwatch.stage("preflight"):
        preflight(needs, capacity.resources, run.stopwatch.watch.note)
    return replace(run, samples=needs.samples)


def remember(run: Run) -> Run:
    """The run with its memory: weights are read once more, to know what they are."""
    recipe, pair = run.job.recipe, run.job.comparison
    if not recipe.ledger:
        return run
    with run.stopwatch.stage("fingerprint weights"):
        weights = fingerprint(pair.source), fingerprint(pair.target)
    return replace(run, memory=Memory(Ledger(run.folder.ledger, run.stopwatch.watch.note), weights, recipe.resources.dtype))
