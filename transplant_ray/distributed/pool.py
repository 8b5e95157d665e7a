"""The evaluator pool: resident pairs that walk the plan, shard by shard of examples, over all variants.

What a unit of work holds follows from the recipe alone; who does it, and when, does not matter to what it gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.actors import Evaluator, Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.overseer import Overseer
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


MOST_DEATHS = 3
"""So often an evaluator may die over a pack before its variants are tried one by one, and over one before it is given up."""


@dataclass(frozen=True)
class Work:
    variants: tuple[Variant, ...]
    examples: tuple[Rendered, ...]
    rules: Rules
    deaths: int = 0
    """Of evaluators that had it in hand, since one of its variants was answered."""

    def after_a_death(self, answered: Collection[str]) -> tuple[list[Work], Variant | None]:
        """What is left to do, and the variant that is to be given up."""
        left = tuple(variant for variant in self.variants if variant.id not in answered)
        deaths = 1 if len(left) < len(self.variants) else self.deaths + 1
        if not left:
            return [], None
        if deaths < MOST_DEATHS:
            return [replace(self, variants=left, deaths=deaths)], None
        if len(left) == 1:
            return [], left[0]
        return [replace(self, variants=(variant,), deaths=0) for variant in left], None


def packed(variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
    return [tuple(variants[first : first + VARIANTS_PER_PACK]) for first in range(0, len(variants), VARIANTS_PER_PACK)]


@dataclass
class _Task:
    """Work in the hands of an evaluator; what comes of it, one reference at a time."""

    evaluator: ActorHandle
    work: Work
    stream: Any
    answered: set[str] = field(default_factory=set)

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(variant.id for variant in self.work.variants if variant.id not in self.answered)


class _Waiting:
    """Work in its order; what was handed back comes first."""

    def __init__(self, work: Iterable[Work]) -> None:
        self.work = iter(work)
        self.first: deque[Work] = deque()

    def __bool__(self) -> bool:
        if not self.first:
            self.first.extend(islice(self.work, 1))
        return bool(self.first)

    def take(self) -> Work:
        return self.first.popleft()


@dataclass(frozen=True)
class Pool:
    evaluators: tuple[ActorHandle, ...]
    rows: int
    """Rows in flight on each evaluator, at most."""
    overseer: Overseer = field(default_factory=Overseer)

    def run(self, work: Iterable[Work], on_result: OnResult) -> None:
        """Hand out the work in order, as it is taken; `on_result` is called here for every variant and shard, as they come.

        A variant over which evaluators die again and again is a shard with that reason.
        """

        def take(shard: VariantShard) -> Collection[str]:
            on_result(shard)
            return [shard.variant]

        def give_up(variant: Variant) -> None:
            on_result(VariantShard(variant.id, (), 0.0, f"its evaluator died {MOST_DEATHS} times while it answered"))

        self._work_through(work, "evaluate", take, give_up)

    def losses(self, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, on_done: OnDone) -> Losses:
        """Mean token loss of every variant."""
        losses: Losses = self._by_pack("losses", variants, examples, rules, on_done, None)
        return losses

    def divergences(self, variants: Sequence[Variant], texts: Sequence[Rendered], rules: Rules, on_done: OnDone) -> Divergences:
        """How far every variant is from the target on these texts."""
        found: Divergences = self._by_pack("divergences", variants, texts, rules, on_done, (None,) * len(texts))
        return found

    def _by_pack(
        self, call: str, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, on_done: OnDone, nothing: Any
    ) -> Any:
        """Variant id → what a call said of it, or `nothing`; `on_done` is told how many variants were read."""
        found: dict[str, Any] = {}

        def take(read: Mapping[str, Any]) -> Collection[str]:
            found.update(read)
            on_done(len(read))
            return read.keys()

        work = [Work(pack, tuple(examples), rules) for pack in packed(variants)]
        self._work_through(work, call, take, lambda variant: found.update({variant.id: nothing}))
        return found

    def _work_through(
        self,
        work: Iterable[Work],
        call: str,
        take: Callable[[Any], Collection[str]],
        give_up: Callable[[Variant], None],
    ) -> None:
        """`take` is given whatever a call gives out and says whose it was; `give_up` is told of variants that kill evaluators."""
        waiting, running = _Waiting(work), list[_Task]()
        idle, restarting = deque(self.evaluators), dict[Any, ActorHandle]()
        while True:
            while idle and waiting:
                running.append(self._start(call, idle.popleft(), waiting.take()))
            if not running and not (restarting and waiting):
                return
            (ready,), _ = ray.wait([*(task.stream for task in running), *restarting], num_returns=1)
            if ready in restarting:
                idle.append(restarting.pop(ready))
                self.overseer.joined(idle[-1])
                continue
            task = next(task for task in running if task.stream is ready)
            try:
                ref = next(task.stream, None)
                if ref is not None:
                    task.answered.update(take(ray.get(ref)))
                    self.overseer.came(task.evaluator, len(task.left))
                    continue
                idle.append(task.evaluator)
            except ray.exceptions.RayActorError:
                self.overseer.died(task.evaluator, task.left)
                restarting[task.evaluator.ping.options(max_task_retries=-1).remote()] = task.evaluator
                again, lost = task.work.after_a_death(task.answered)
                waiting.first.extendleft(reversed(again))
                if lost is not None:
                    give_up(lost)
            running.remove(task)

    def _start(self, call: str, evaluator: ActorHandle, work: Work) -> _Task:
        """Without retries by Ray, which would evaluate all of it again, and for ever."""
        self.overseer.handed_out(evaluator, len(work.variants))
        method = getattr(evaluator, call).options(num_returns="streaming", max_task_retries=0)
        return _Task(evaluator, work, method.remote(work.variants, work.examples, work.rules, self.rows))


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
    overseer: Overseer,
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
        for evaluator in evaluators:
            overseer.joined(evaluator)
        yield Pool(evaluators, rows, overseer)
