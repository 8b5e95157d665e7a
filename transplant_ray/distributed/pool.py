"""The evaluator pool: resident pairs that walk the plan, shard by shard of examples, over all variants.

What a unit of work holds follows from the recipe alone; who does it, and when, does not matter to what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util import ActorPool

from transplant_ray.distributed.actors import Evaluator, Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.probing import released
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.engine import VARIANTS_PER_PACK
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Rules
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison

OnDone = Callable[[int], None]
OnResult = Callable[[VariantShard], None]
Losses = dict[str, float | None]
"""Variant id → mean token loss; None where it is not a number."""
Divergences = dict[str, tuple[float | None, ...]]
"""Variant id → KL(target ‖ variant) on each text; None where it is not a number."""


@dataclass(frozen=True)
class Work:
    variants: tuple[Variant, ...]
    examples: tuple[Rendered, ...]
    rules: Rules


def packed(variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
    return [tuple(variants[first : first + VARIANTS_PER_PACK]) for first in range(0, len(variants), VARIANTS_PER_PACK)]


@dataclass(frozen=True)
class Pool:
    evaluators: tuple[ActorHandle, ...]
    rows: int
    """Rows in flight on each evaluator, at most."""

    def run(self, work: Iterable[Work], on_result: OnResult) -> None:
        """Hand out the work in order, as it is taken; `on_result` is called here for every variant and shard, as they come."""
        waiting = iter(work)
        running: list[tuple[Any, ActorHandle]] = []
        for evaluator in self.evaluators:
            self._hand_out(waiting, running, evaluator)
        while running:
            ready, _ = ray.wait([stream for stream, _ in running], num_returns=1)
            index = next(i for i, (stream, _) in enumerate(running) if stream is ready[0])
            stream, evaluator = running[index]
            ref = next(stream, None)
            if ref is not None:
                on_result(ray.get(ref))
            else:
                del running[index]
                self._hand_out(waiting, running, evaluator)

    def losses(self, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, on_done: OnDone) -> Losses:
        """Mean token loss of every variant."""
        losses: Losses = self._by_pack(lambda actor, pack: actor.losses.remote(pack, examples, rules, self.rows), variants, on_done)
        return losses

    def divergences(self, variants: Sequence[Variant], texts: Sequence[Rendered], rules: Rules, on_done: OnDone) -> Divergences:
        """How far every variant is from the target on these texts."""
        found: Divergences = self._by_pack(
            lambda actor, pack: actor.divergences.remote(pack, texts, rules, self.rows), variants, on_done
        )
        return found

    def _by_pack(self, call: Callable[[ActorHandle, Sequence[Variant]], Any], variants: Sequence[Variant], on_done: OnDone) -> Any:
        """Variant id → what a call said of it; `on_done` is told how many variants were read."""
        found: dict[str, Any] = {}
        for read in ActorPool(list(self.evaluators)).map(call, packed(variants)):
            found |= read
            on_done(len(read))
        return found

    def _hand_out(self, waiting: Iterator[Work], running: list[tuple[Any, ActorHandle]], evaluator: ActorHandle) -> None:
        work = next(waiting, None)
        if work is not None:
            stream = evaluator.evaluate.options(num_returns="streaming").remote(work.variants, work.examples, work.rules, self.rows)
            running.append((stream, evaluator))


@contextmanager
def evaluator_pool(
    comparison: Comparison,
    names: frozenset[str],
    workload: Workload,
    capacity: Capacity,
    size: int,
    examples: Sequence[Rendered],
    rules: Rules,
    rows: int | None,
) -> Iterator[Pool]:
    """`size` evaluators that hold the target and, of the source, the modules in `names`.

    `rows` is how many rows each has in flight; None lets the first of them measure it, for `examples` and their `rules`.
    """
    with ExitStack() as stack:
        actors = [capacity.start(Evaluator, comparison, names, workload) for _ in range(size)]
        evaluators = tuple(stack.enter_context(released(actor)) for actor in actors)
        if rows is None:
            most = VARIANTS_PER_PACK * len(examples)
            rows = int(ray.get(evaluators[0].measure_rows.remote(examples, rules, most)))
        yield Pool(evaluators, rows)


@contextmanager
def working(work: Callable[[], None], on_failure: Callable[[str], None]) -> Iterator[None]:
    """`work` is done in a thread while the block runs; after the block it is finished, or its error is raised.

    `on_failure` is told at once, so that whoever waits for outcomes in the block does not wait for ever.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluator-pool")
    future = executor.submit(work)
    future.add_done_callback(lambda done: on_failure(repr(error)) if (error := done.exception()) else None)
    try:
        yield
        future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
