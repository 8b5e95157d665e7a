"""Who is in the evaluator pool and who works; and how its work is ended before it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.facts import AtWork, EvaluatorDied, EvaluatorJoined, EvaluatorRestarted, Fact

WRAP_UP_SECONDS = 10
"""How long the pool's thread has to write the ledger when it is stopped."""


class Stopped(Exception):
    """Raised in whoever works with the pool once it was told to stop."""


class Overseer:
    """Is told by the pool what happens to its evaluators, in whatever thread the pool works."""

    def __init__(self, tell: Callable[[Fact], None] = lambda _: None, gpus_each: float = 0.0) -> None:
        self.tell, self.gpus_each = tell, gpus_each
        self.evaluators: dict[ActorHandle, int] = {}
        """How many variants each has in hand."""
        self.dead: set[ActorHandle] = set()
        self.at_work = AtWork(0, 0, 0.0)
        self.stopped = False

    def go_on(self) -> None:
        """Raises Stopped once `stop` was called."""
        if self.stopped:
            raise Stopped

    def joined(self, evaluator: ActorHandle) -> None:
        """It is there, or there again."""
        self.go_on()
        self.tell(EvaluatorRestarted(name_of(evaluator)) if evaluator in self.dead else EvaluatorJoined(name_of(evaluator)))
        self.dead.discard(evaluator)
        self._is_busy(evaluator, 0)

    def handed_out(self, evaluator: ActorHandle, num_variants: int) -> None:
        self.go_on()
        self._is_busy(evaluator, num_variants)

    def came(self, evaluator: ActorHandle, num_left: int) -> None:
        """An answer; so many variants of the work in hand have not answered yet."""
        self._is_busy(evaluator, num_left)

    def died(self, evaluator: ActorHandle, variants: tuple[str, ...]) -> None:
        """Over these variants, which it had in hand."""
        self.go_on()
        self.dead.add(evaluator)
        self.tell(EvaluatorDied(name_of(evaluator), variants))
        self._is_busy(evaluator, 0)

    def stop(self) -> None:
        """End the work of the pool: evaluators are killed, which wakes whoever waits for them, and who goes on is told Stopped."""
        self.stopped = True
        for evaluator in list(self.evaluators):
            ray.kill(evaluator)

    def _is_busy(self, evaluator: ActorHandle, num_variants: int) -> None:
        self.evaluators[evaluator] = num_variants
        busy = sum(num > 0 for num in self.evaluators.values())
        now = AtWork(busy, len(self.evaluators) - len(self.dead), busy * self.gpus_each)
        if now != self.at_work:
            self.at_work = now
            self.tell(now)


def name_of(evaluator: ActorHandle) -> str:
    """The beginning of its actor id, as Ray's dashboard has it."""
    return str(evaluator._actor_id.hex())[:12]


@contextmanager
def working(work: Callable[[], None], on_failure: Callable[[str], None], stop: Callable[[], None]) -> Iterator[None]:
    """`work` is done in a thread while the block runs; after the block it is finished, or its error is raised.

    `on_failure` is told at once, so that whoever waits for outcomes in the block does not wait for ever. Where the block is left
    early, `stop` ends the work, which is waited for: what would go on after Ray has been shut down starts another.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluator-pool")
    future = executor.submit(work)
    left_early = False
    future.add_done_callback(lambda done: on_failure(repr(error)) if (error := done.exception()) and not left_early else None)
    try:
        yield
        future.result()
    except BaseException:
        left_early = True
        stop()
        wait([future], WRAP_UP_SECONDS)
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
