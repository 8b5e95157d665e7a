"""Asking variants what they have not been asked yet: nothing is answered twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from transplant_ray.distributed.pool import Pool, plan_work
from transplant_ray.evaluate.example import Split
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.run import Run


def ask(run: Run, pool: Pool, name: str, split: Split, variants: Sequence[Variant]) -> None:
    """Each variant answers the examples that it has not answered, which stand behind those that it has; one that failed is left."""
    task = run.job.tasks[name]
    waiting: dict[int, dict[str, Variant]] = defaultdict(dict)
    for variant in variants:
        tally = run.tally(name, split, variant.id)
        if tally is None or tally.error is None:
            waiting[tally.n if tally else 0][variant.id] = variant
    for known, some in waiting.items():
        work = plan_work(list(some.values()), task.examples[split][known:], task.rules, run.job.recipe.resources.shard_size)
        pool.run(work, partial(run.take, name, split))
