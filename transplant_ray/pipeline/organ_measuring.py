"""Asking the models of an organ sweep what they have not been asked yet, by this run or by another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from transplant_ray.distributed.actors import Workload
from transplant_ray.distributed.cluster import Capacity, connect
from transplant_ray.distributed.facts import EvaluatorDied, VariantDone, VariantFailed, VariantRecalled, of_shard
from transplant_ray.distributed.organ_trials import TrialDone, Trials, run_organ_trials
from transplant_ray.distributed.preflight import COMPARED, make_needs, preflight, samples_of
from transplant_ray.distributed.probing import Asked
from transplant_ray.errors import ResourceError
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.ledger import Ledger, page_key
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.significance import Scores
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.organ.grid import Trial
from transplant_ray.pipeline.asking import ALONE, answer_made
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.organ_grid import OrganJob
from transplant_ray.pipeline.watch import Stopwatch
from transplant_ray.versions import versions

EXPORTED = "exported"
"""Whose outcomes are the written checkpoint's, loaded by plain `transformers`."""


class Measuring:
    """What is known of every model. Ray is started when there is something to measure, and not before."""

    def __init__(self, job: OrganJob, stopwatch: Stopwatch, cluster: ExitStack) -> None:
        self.job, self.stopwatch = job, stopwatch
        self.answered = {name: Answers() for name in job.asked}
        self.errors: dict[tuple[str, Split], str] = {}
        """Id of a trial and split → why it has not answered."""
        self.recalled = self.measured = 0
        """Blocks and examples, over all models."""
        self.processes: set[int] = set()
        """That trials ran in."""
        self.ledger = Ledger(job.folder.ledger, stopwatch.watch.note) if job.recipe.ledger else None
        with stopwatch.stage("fingerprint weights"):
            self.weights, self.samples = fingerprint(job.recipient), samples_of([job.recipient])
        self._cluster = cluster
        self._capacity: Capacity | None = None

    @property
    def workload(self) -> Workload:
        resources = self.job.recipe.resources
        threads = max(1, int(resources.cpus_per_model))
        recipient = self.job.recipient
        return Workload(
            tokenizer=recipient,
            dtype=resources.dtype,
            num_gpus=resources.gpus_per_model,
            num_threads=threads,
            run=self.job.recipe.name,
            versions=versions(COMPARED),
            samples=self.samples,
        )

    def measure(self, trials: Sequence[Trial], split: Split) -> None:
        """Each model answers this split of everything that is asked; models of the same layers once."""
        distinct = {trial.id: trial for trial in trials}
        waiting: dict[str, list[Asked]] = {}
        for id in distinct:
            if unknown := self._recall(self.weights, id, id, self._asked(split)):
                waiting[id] = unknown
            else:
                self.stopwatch.watch.hear(VariantRecalled(id, split))
                self._is_done(id, split)
        if not waiting:
            return
        job = Trials({id: distinct[id] for id in waiting}, waiting, self.workload)
        for done in run_organ_trials(job, self._connected()):
            self._take(done, split)

    def measure_exported(self, checkpoint: Checkpoint, splits: Sequence[Split]) -> None:
        """What the written checkpoint says when it is loaded by itself."""
        weights = fingerprint(checkpoint)
        asked = [one for split in splits for one in self._asked(split)]
        if unknown := self._recall(weights, ALONE, EXPORTED, asked):
            for one, shard in answer_made(self.job.folder, checkpoint, ALONE, unknown, self.workload, self._connected()):
                self._keep(weights, one.task, one.split, shard)
                self._add(one.task, one.split, _renamed(shard, EXPORTED))
                if self.ledger is not None:
                    self.ledger.write()

    def tally(self, name: str, split: Split, variant: str) -> Tally | None:
        tally = self.answered[name].tallies.get(split, {}).get(variant)
        return tally if tally is not None and tally.n == len(self.job.asked[name].examples[split]) else None

    def scores(self, name: str, split: Split, variant: str) -> Scores | None:
        """Minus the losses, or whether answers are right; None where not all is answered."""
        ids = [example.id for example in self.job.asked[name].examples[split]]
        return self.answered[name].scores(split, variant, ids)

    def _asked(self, split: Split) -> list[Asked]:
        return [Asked(name, split, task.examples[split], task.rules) for name, task in self.job.asked.items()]

    def _recall(self, weights: str, kept: str, name: str, asked: Sequence[Asked]) -> list[Asked]:
        """Takes what the ledger knows of `kept`, as `name`; returns what is left to ask."""
        if self.ledger is None:
            return list(asked)
        left = []
        for one in asked:
            shard = self.ledger.recall(self._page(weights, one.task), kept, one.examples)
            known = {outcome.example for outcome in shard.outcomes}
            if known:
                self._add(one.task, one.split, _renamed(shard, name))
            if unknown := [example for example in one.examples if example.id not in known]:
                left.append(replace(one, examples=unknown))
        return left

    def _take(self, done: TrialDone, split: Split) -> None:
        for _ in range(done.deaths):
            self.stopwatch.watch.hear(EvaluatorDied("", (done.id,)))  # Tune does not say which
        if done.deaths and done.error is None:
            self.stopwatch.watch.note("a process died under a trial and was started again")
        self.processes |= set() if done.process is None else {done.process}
        for task, of, shard in done.said:
            self._keep(self.weights, task, of, shard)
            self._add(task, of, shard)
        if done.error is not None:
            self.errors[done.id, split] = done.error
            self.stopwatch.watch.hear(VariantFailed(done.id, done.error))
        if self.ledger is not None:
            self.ledger.write()  # a trial takes long, and whoever kills us now should not lose it
        self._is_done(done.id, split)

    def _is_done(self, id: str, split: Split) -> None:
        if split == "select":  # what is asked on test was counted there
            self.stopwatch.watch.hear(VariantDone(id))
        self.stopwatch.watch.advance(1)

    def _keep(self, weights: str, task: str, split: Split, shard: VariantShard) -> None:
        if self.ledger is not None:
            by_id = {example.id: example for example in self.job.asked[task].examples[split]}
            self.ledger.keep(self._page(weights, task), shard, [by_id[outcome.example] for outcome in shard.outcomes])

    def _add(self, task: str, split: Split, shard: VariantShard) -> None:
        self.answered[task].add(split, shard)
        if shard.error is not None:
            self.errors.setdefault((shard.variant, split), shard.error)
        if shard.recalled:
            self.recalled += len(shard.outcomes)
        else:
            self.measured += len(shard.outcomes)
        self.stopwatch.watch.hear(of_shard(task, split, shard))

    def _page(self, weights: str, task: str) -> str | None:
        return page_key((weights,), self.job.recipe.resources.dtype, self.job.asked[task].rules)

    def _connected(self) -> Capacity:
        if self._capacity is None:
            self._capacity = self._cluster.enter_context(connect(self.job.recipe.resources))
            self._cluster.enter_context(terminable())  # Ray has taken the signal for itself
            check_reach(self.job, self._capacity.num_elsewhere)
            self._check_nodes(self._capacity)
        return self._capacity

    def _check_nodes(self, capacity: Capacity) -> None:
        """Every node that may be given a trial shows that it can do it: before a process has loaded anything."""
        job = self.job
        untrained = {str(trial.organ): trial.insertion.placements[0].organ for trial in job.grid.of("untrained")}
        needs = make_needs(
            {"recipient": job.recipient},
            job.folder.ledger,
            job.recipe.tracking,
            scorers=(task.rules.scorer for task in job.asked.values()),
            organs={
                **{f"organs.{name}": organ for name, organ in job.organs.items()},
                **{f"controls.untrained of {name}": organ for name, organ in untrained.items()},
            },
        )
        with self.stopwatch.stage("preflight"):
            preflight(needs, capacity.resources, self.stopwatch.watch.note)


def check_reach(job: OrganJob, num_elsewhere: int) -> None:
    """ResourceError where layers that the driver has written lie where other nodes do not see them."""
    if job.folder.address is not None and num_elsewhere and job.recipe.controls.untrained:
        raise ResourceError(
            f"`storage` {job.folder.public_address}: the untrained controls are layers in a folder of this machine, which "
            f"{num_elsewhere} other nodes must see. Give a folder that all share, or use controls.untrained=false."
        )


@contextmanager
def measuring(job: OrganJob, stopwatch: Stopwatch) -> Iterator[Measuring]:
    """For the block there may be a cluster."""
    with ExitStack() as cluster:
        yield Measuring(job, stopwatch, cluster)


def _renamed(shard: VariantShard, name: str) -> VariantShard:
    return replace(shard, variant=name, outcomes=tuple(replace(outcome, variant=name) for outcome in shard.outcomes))
