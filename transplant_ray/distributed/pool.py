"""The evaluator pool: resident pairs that walk the plan, shard by shard of examples, over all variants.

What a unit of work holds follows from the recipe alone; who does it, and when, does not matter to what it gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.actors import Evaluator, Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.fleet import RESIZE_SECONDS, Fleet, Member, fleet, nodes_alive
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.engine import VARIANTS_PER_PACK
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Rules
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison

OnRead = Callable[[Mapping[str, Any]], None]
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
    deaths: tuple[str, ...] = ()
    """Nodes of the evaluators that died with it in hand, since one of its variants was answered."""

    def after_a_death(self, answered: Collection[str], node: str, alive: Collection[str]) -> tuple[list[Work], Variant | None]:
        """What is left to do, and the variant that is to be given up. A death with the whole node is nobody's fault."""
        left = tuple(variant for variant in self.variants if variant.id not in answered)
        before = self.deaths if len(left) == len(self.variants) else ()
        deaths = tuple(place for place in (*before, node) if place in alive)
        if not left:
            return [], None
        if len(deaths) < MOST_DEATHS:
            return [replace(self, variants=left, deaths=deaths)], None
        if len(left) == 1:
            return [], left[0]
        return [replace(self, variants=(variant,), deaths=()) for variant in left], None


def packed(variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
    return [tuple(variants[first : first + VARIANTS_PER_PACK]) for first in range(0, len(variants), VARIANTS_PER_PACK)]


@dataclass
class _Task:
    """Work in the hands of an evaluator; what comes of it, one reference at a time."""

    member: Member
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
    fleet: Fleet
    rows: int
    """Rows in flight on each evaluator, at most."""

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

    def losses(self, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, on_read: OnRead) -> None:
        """Mean token loss of every variant: `on_read` is given `Losses` as they come."""
        self._by_pack("losses", variants, examples, rules, on_read, None)

    def divergences(self, variants: Sequence[Variant], texts: Sequence[Rendered], rules: Rules, on_read: OnRead) -> None:
        """How far every variant is from the target on these texts: `on_read` is given `Divergences` as they come."""
        self._by_pack("divergences", variants, texts, rules, on_read, (None,) * len(texts))

    def _by_pack(
        self, call: str, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, on_read: OnRead, nothing: Any
    ) -> None:
        """Of a variant that kills whoever reads with it, `nothing` is known."""

        def take(read: Mapping[str, Any]) -> Collection[str]:
            on_read(read)
            return read.keys()

        work = [Work(pack, tuple(examples), rules) for pack in packed(variants)]
        self._work_through(work, call, take, lambda variant: on_read({variant.id: nothing}))

    def _work_through(
        self,
        work: Iterable[Work],
        call: str,
        take: Callable[[Any], Collection[str]],
        give_up: Callable[[Variant], None],
    ) -> None:
        """`take` is given whatever a call gives out and says whose it was; `give_up` is told of variants that kill evaluators."""
        waiting, running, fleet = _Waiting(work), list[_Task](), self.fleet
        while True:
            while waiting and (member := fleet.take()) is not None:
                running.append(self._start(call, member, waiting.take()))
            if not running and not waiting:
                return
            fleet.resize()
            ready, _ = ray.wait([*(task.stream for task in running), *fleet.joining], num_returns=1, timeout=RESIZE_SECONDS)
            for stream in ready:
                if stream in fleet.joining:
                    fleet.welcome(stream)
                    continue
                task = next(task for task in running if task.stream is stream)
                try:
                    ref = next(stream, None)
                    if ref is not None:
                        task.answered.update(take(ray.get(ref)))
                        fleet.overseer.came(task.member.actor, len(task.left))
                        continue
                    fleet.give_back(task.member)
                except ray.exceptions.RayActorError:
                    fleet.died(task.member, task.left)
                    again, lost = task.work.after_a_death(task.answered, task.member.node, nodes_alive())
                    waiting.first.extendleft(reversed(again))
                    if lost is not None:
                        give_up(lost)
                running.remove(task)

    def _start(self, call: str, member: Member, work: Work) -> _Task:
        """Without retries by Ray, which would evaluate all of it again, and for ever."""
        self.fleet.overseer.handed_out(member.actor, len(work.variants))
        method = getattr(member.actor, call).options(num_returns="streaming", max_task_retries=0)
        return _Task(member, work, method.remote(work.variants, work.examples, work.rules, self.rows))


@contextmanager
def evaluator_pool(
    comparison: Comparison,
    names: frozenset[str],
    workload: Workload,
    capacity: Capacity,
    examples: Sequence[Rendered],
    rules: Rules,
    rows: int | None,
    overseer: Overseer,
    note: Callable[[str], None],
) -> Iterator[Pool]:
    """Evaluators that hold the target and, of the source, the modules in `names`.

    `rows` is how many rows each has in flight; None lets the first of them measure it, for `examples` and their `rules`.
    """

    def start() -> ActorHandle:
        return capacity.start(Evaluator, "evaluator", comparison, names, workload)

    with fleet(start, capacity.evaluators, overseer, note) as gathered:
        if rows is None:
            most = VARIANTS_PER_PACK * len(examples)
            rows = int(ray.get(gathered.first().actor.measure_rows.remote(examples, rules, most)))
        yield Pool(gathered, rows)
