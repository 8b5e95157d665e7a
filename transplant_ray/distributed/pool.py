"""The evaluator pool: resident pairs that walk the plan, shard by shard of examples, over all variants.

What a unit of work holds follows from the recipe alone; who does it, and when, does not matter to what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ray.actor import ActorHandle

from transplant_ray.distributed.actors import Evaluator, Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.fleet import MOST_NODES, Fleet, fleet, nodes_alive
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.room import Refused
from transplant_ray.errors import ResourceError
from transplant_ray.evaluate.answers import VariantShard, shard_name
from transplant_ray.evaluate.engine import VARIANTS_PER_PACK
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Rules
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison

OnRead = Callable[[Mapping[str, Any]], None]
OnResult = Callable[[VariantShard], None]
GiveUp = Callable[[Variant, Sequence[Rendered]], None]
"""The variant, and what it was asked."""
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
        """What is left to do, and the variant that is to be given up. A death with the whole node counts for less."""
        left = tuple(variant for variant in self.variants if variant.id not in answered)
        before = self.deaths if len(left) == len(self.variants) else ()
        deaths = (*before, node)
        if not left:
            return [], None
        if sum(place in alive for place in deaths) < MOST_DEATHS and len(deaths) < MOST_NODES:
            return [replace(self, variants=left, deaths=deaths)], None
        if len(left) == 1:
            return [], left[0]
        return [replace(self, variants=(variant,), deaths=()) for variant in left], None


def packed(variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
    return [tuple(variants[first : first + VARIANTS_PER_PACK]) for first in range(0, len(variants), VARIANTS_PER_PACK)]


@dataclass
class _Task:
    """Work in the hands of an evaluator."""

    work: Work
    call: str
    rows: int
    on_found: Callable[[Any], Collection[str]]
    """Is given whatever the call gives out, and says whose it was."""
    give_up: GiveUp
    """Is told of variants that kill evaluators."""
    answered: set[str] = field(default_factory=set)

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(variant.id for variant in self.work.variants if variant.id not in self.answered)

    def start(self, actor: ActorHandle) -> Any:
        method = getattr(actor, self.call).options(num_returns="streaming", max_task_retries=0)
        return method.remote(self.work.variants, self.work.examples, self.work.rules, self.rows)

    def take(self, found: Any) -> None:
        self.answered.update(self.on_found(found))

    def after_a_death(self, node: str) -> list[_Task]:
        again, lost = self.work.after_a_death(self.answered, node, nodes_alive())
        if lost is not None:
            self.give_up(lost, self.work.examples)
        return [replace(self, work=work, answered=set()) for work in again]


@dataclass(frozen=True)
class _Measuring:
    """How many rows an evaluator likes: whoever comes first is asked."""

    examples: Sequence[Rendered]
    rules: Rules
    rows: list[int] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)

    left = ()

    def start(self, actor: ActorHandle) -> Any:
        method = actor.measure_rows.options(num_returns="streaming", max_task_retries=0)
        return method.remote(self.examples, self.rules, VARIANTS_PER_PACK * len(self.examples))

    def take(self, found: int) -> None:
        self.rows.append(found)

    def after_a_death(self, node: str) -> list[_Measuring]:
        self.deaths.append(node)
        if self.rows:
            return []
        if len(self.deaths) == MOST_NODES:
            raise ResourceError(
                f"evaluators died {MOST_NODES} times while they tried how many rows they have memory for. Give "
                "`resources.batch_size` a number, or a machine with more of it. The same command goes on where this one stopped."
            )
        return [self]


@dataclass(frozen=True)
class Pool:
    fleet: Fleet
    rows: int
    """Rows in flight on each evaluator, at most."""

    def run(self, work: Iterable[Work], on_result: OnResult, on_tick: Callable[[], None] = lambda: None) -> None:
        """Hand out the work in order, as it is taken; `on_result` is called here for every variant and shard, as they come, and
        `on_tick` all the while.

        A variant over which evaluators die again and again is a shard with that reason.
        """

        def take(shard: VariantShard) -> Collection[str]:
            on_result(shard)
            return [shard.variant]

        def give_up(variant: Variant, examples: Sequence[Rendered]) -> None:
            reason = f"its evaluator died {MOST_DEATHS} times, or {MOST_NODES} times with its node, while it answered"
            on_result(VariantShard(variant.id, (), 0.0, reason, asked=shard_name([example.id for example in examples])))

        self._work_through(work, "evaluate", take, give_up, on_tick)

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
        self._work_through(work, call, take, lambda variant, _: on_read({variant.id: nothing}))

    def _work_through(
        self,
        work: Iterable[Work],
        call: str,
        take: Callable[[Any], Collection[str]],
        give_up: GiveUp,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.fleet.work_through((_Task(each, call, self.rows, take, give_up) for each in work), on_tick)


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

    def start(refused: Refused) -> ActorHandle:
        return capacity.start(Evaluator, "evaluator", comparison, names, workload, refused=refused)

    with fleet(start, capacity.evaluators, overseer, note, grows=capacity.grows) as gathered:
        if rows is None:
            measuring = _Measuring(examples, rules)
            gathered.work_through([measuring])
            rows = measuring.rows[0]
        yield Pool(gathered, rows)
