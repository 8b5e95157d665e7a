"""Asking variants what they have not been asked yet, by this run or by another: nothing is answered twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from transplant_ray.distributed.actors import Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.pool import Pool, Work, packed
from transplant_ray.distributed.probing import Asked, Said, answer_alone
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered, Split
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.pipeline.run import Memory, Run
from transplant_ray.storage import RunFolder

ALONE = "alone"
"""Under which the ledger has a checkpoint that answers by itself: who it is, its weights say."""

Take = Callable[[VariantShard], None]


def ask(run: Run, pool: Pool, name: str, split: Split, variants: Sequence[Variant]) -> None:
    """Each variant answers the examples that it has not answered, which stand behind those that it has; one that failed is left."""
    examples = run.job.tasks[name].examples[split]
    waiting: dict[int, dict[str, Variant]] = defaultdict(dict)
    for variant in variants:
        tally = run.tally(name, split, variant.id)
        if tally is None or tally.error is None:
            waiting[tally.n if tally else 0][variant.id] = variant
    for known, some in waiting.items():
        work_off(run, pool, name, list(some.values()), examples[known:], partial(run.take, name, split))


def work_off(run: Run, pool: Pool, name: str, variants: Sequence[Variant], examples: Sequence[Rendered], take: Take) -> None:
    """All these variants answer all these examples of a task: from the ledger where it knows them, else from the pool.

    Shard by shard: all variants answer a shard before the next begins; neighbours in the plan stay neighbours.
    """
    memory, rules = run.memory, run.job.tasks[name].rules
    page = None if memory is None else memory.page(rules)
    by_id = {example.id: example for example in examples}

    def keep(shard: VariantShard) -> None:
        if memory is not None:
            memory.ledger.keep(page, shard, [by_id[outcome.example] for outcome in shard.outcomes])
        take(shard)

    def left() -> Iterator[Work]:
        size = run.job.recipe.resources.shard_size
        for start in range(0, len(examples), size):
            waiting: dict[tuple[Rendered, ...], list[Variant]] = defaultdict(list)
            shard = tuple(examples[start : start + size])
            for variant in variants:
                waiting[_recall(memory, page, variant.id, shard, take)].append(variant)
            for unknown, some in waiting.items():
                yield from (Work(pack, unknown, rules) for pack in packed(some) if unknown)

    try:
        pool.run(left(), keep, memory.ledger.write_if_due if memory is not None else lambda: None)
    finally:
        if memory is not None:
            memory.ledger.write()


def _recall(
    memory: Memory | None, page: str | None, variant: str, examples: tuple[Rendered, ...], take: Take
) -> tuple[Rendered, ...]:
    """Takes what the ledger knows; returns the examples that it does not."""
    if memory is None:
        return examples
    shard = memory.ledger.recall(page, variant, examples)
    if not shard.outcomes:
        return examples
    take(shard)
    known = {outcome.example for outcome in shard.outcomes}
    return tuple(example for example in examples if example.id not in known)


def ask_alone(run: Run, checkpoint: Checkpoint, name: str, asked: Sequence[Asked], capacity: Capacity) -> Said:
    """What a checkpoint answers when it is loaded by itself; it is loaded only where the ledger does not know all of it."""
    weights = fingerprint(checkpoint) if run.memory else ""
    said, unknown = recall_alone(run, weights, name, asked)
    if unknown:
        for one, shard in answer_made(run.folder, checkpoint, name, unknown, run.workload, capacity):
            keep_alone(run, weights, one, shard)
            said.append((one, shard))
    return said


def answer_made(
    folder: RunFolder, checkpoint: Checkpoint, name: str, asked: Sequence[Asked], workload: Workload, capacity: Capacity
) -> Iterator[tuple[Asked, VariantShard]]:
    """A checkpoint that a run has made is in a folder of the driver's machine, where other nodes need not see it."""
    if checkpoint.folder is None or not (capacity.num_elsewhere or capacity.grows):
        yield from answer_alone(checkpoint, name, asked, workload, capacity)
        return
    with folder.lent(checkpoint.folder) as home:
        yield from answer_alone(replace(checkpoint, home=home), name, asked, workload, capacity)


def recall_alone(run: Run, weights: str, name: str, asked: Sequence[Asked]) -> tuple[Said, list[Asked]]:
    """What the ledger knows, and what is left to ask."""
    if run.memory is None:
        return [], list(asked)
    said: Said = []
    left: list[Asked] = []
    for one in asked:
        shard = run.memory.ledger.recall(run.memory.page_alone(weights, one.rules), ALONE, one.examples)
        known = {outcome.example for outcome in shard.outcomes}
        if known:
            said.append((one, _renamed(shard, name)))
        if unknown := [example for example in one.examples if example.id not in known]:
            left.append(replace(one, examples=unknown))
    return said, left


def keep_alone(run: Run, weights: str, asked: Asked, shard: VariantShard) -> None:
    """At once: a split takes such a model long, and whoever kills the driver now should not lose it."""
    if run.memory is not None:
        run.memory.ledger.keep(run.memory.page_alone(weights, asked.rules), _renamed(shard, ALONE), asked.examples)
        run.memory.ledger.write()


def _renamed(shard: VariantShard, name: str) -> VariantShard:
    return replace(shard, variant=name, outcomes=tuple(replace(outcome, variant=name) for outcome in shard.outcomes))
