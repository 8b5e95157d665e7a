"""The fleet: actors that come and go, and how work is handed to them. A member is idle, at work, or joining: its actor loads, or
waits for room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.cluster import GONE, RETRIES
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.room import Refused
from transplant_ray.errors import CheckpointError, DeviceError, OrganError, ResourceError, TransplantError, UnfitNode

RESIZE_SECONDS = 5.0
"""How often it is asked whether the cluster has grown or shrunk."""
PAUSE_SECONDS = 600.0
"""After which places that were of no use are tried again: a folder may be mounted by then, or a hub answer."""
ANSWER_SECONDS = 10.0
"""For one who has just answered, and may be gone since."""
MOST_FAILURES = 7
"""So often in a row a device may fail that is the only one there is: work that is what makes it fail is given up before."""
MOST_NODES = 6
"""So often work may take a whole node with it: that is a node's fault, but where it goes on, each may have run out of memory."""
WHOLE = 1_000_000
"""More places than a node has."""
UNFIT = (CheckpointError, OrganError, UnfitNode)
"""What is wrong with a node and all on it: other weights or libraries than the driver's, or none."""
NEVER_STARTED = (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.ActorUnschedulableError)


@dataclass(frozen=True)
class Member:
    """An actor that has loaded, on the node where it is now."""

    actor: ActorHandle
    node: str


class Task(Protocol):
    """Work in the hands of one member."""

    @property
    def left(self) -> tuple[str, ...]:
        """Ids of what has not come of it yet."""

    def start(self, actor: ActorHandle) -> Any:
        """Hand it over: the stream of what comes of it. Without retries by Ray, which would do all of it again, and for ever."""

    def take(self, found: Any) -> None:
        """What has come."""

    def after_a_death(self, node: str) -> Iterable[Task]:
        """What is left to do, after whoever had it died on that node."""


class Fleet:
    """As many actors as there should be; those that die come back by themselves, and join again."""

    def __init__(
        self,
        start: Callable[[Refused], ActorHandle],
        size: Callable[[Refused], int],
        overseer: Overseer,
        note: Callable[[str], None],
        *,
        grows: bool = False,
    ) -> None:
        """`start` makes an actor, `size` says how many there should be now, `note` is told of those that cannot be used.

        Where the cluster `grows` by itself, one more waits for room as long as work waits: to an autoscaler that is a demand.
        """
        self.start, self.size, self.overseer, self.note, self.grows = start, size, overseer, note, grows
        self.joining: dict[Any, ActorHandle] = {}
        self.idle: deque[Member] = deque()
        self.at_work: list[Member] = []
        self.refused: dict[str, int] = {}
        """Of nodes that are alive, how many places were of no use to newcomers: they stay empty."""
        self.lost = 0
        """Newcomers whose process died again and again while it loaded, or never started; nobody knows where, and their places stay
        empty too, until somebody joins."""
        self.left_out_at = 0.0
        self.failures = 0
        """Of devices at work, since an answer came."""
        self.alive: Collection[str] = ()
        self.alive_before: Collection[str] = ()
        """Nodes, as they were looked at last, and the time before."""
        self.looked_at = -RESIZE_SECONDS
        self.resized_at = -RESIZE_SECONDS
        self.resize()

    def __len__(self) -> int:
        return len(self.joining) + len(self.idle) + len(self.at_work)

    def resize(self, *, work_waits: bool = False) -> None:
        """Start those that are missing; of those that wait for room which is gone, let go. Who works is never disturbed."""
        self.overseer.go_on()
        if time.monotonic() - self.resized_at < RESIZE_SECONDS:
            return
        self.resized_at = time.monotonic()
        alive = nodes_alive()
        if self.resized_at - self.left_out_at > PAUSE_SECONDS:
            self.refused, self.lost = {}, 0
        self.refused = {node: number for node, number in self.refused.items() if node in alive}
        wanted = max(1, self.size(self.refused)) + (self.grows and work_waits)
        for _ in range(max(1, wanted - self.lost) - len(self)):
            self._join(self.start(self.refused))
        self._let_go(len(self) - wanted)

    def _look_around(self) -> None:
        """Who is idle on a node that is gone starts again where there is room, and joins again before anything is given to it.

        A call to it would wait for its restart, and for ever where there is no room.
        """
        if time.monotonic() - self.looked_at < RESIZE_SECONDS:
            return
        self.looked_at = time.monotonic()
        self.alive_before, self.alive = self.alive, nodes_alive()
        for member in [member for member in self.idle if member.node not in self.alive]:
            self.idle.remove(member)
            self.overseer.died(member.actor, ())
            self._join(member.actor)

    def _let_go(self, number: int) -> None:
        """Of so many who have not joined, the latest first."""
        for ref, actor in list(reversed(self.joining.items()))[: max(0, number)]:
            del self.joining[ref]
            ray.kill(actor)

    def take(self) -> Member | None:
        """An idle member, who is at work from now on."""
        if not self.idle:
            return None
        self.at_work.append(self.idle.popleft())
        return self.at_work[-1]

    def give_back(self, member: Member) -> None:
        self.at_work.remove(member)
        self.idle.append(member)

    def died(self, member: Member, variants: tuple[str, ...]) -> None:
        """Over these variants, or whatever its work has. Its actor starts again where there is room, and joins again."""
        self.overseer.died(member.actor, variants)
        self.at_work.remove(member)
        self._join(member.actor)

    def welcome(self, ref: Any) -> None:
        """One of `joining` has answered. Raises what kept it from loading where there is nobody else."""
        self.overseer.go_on()
        actor = self.joining.pop(ref)
        try:
            member = Member(actor, ray.get(ref))
            self.idle.append(member)
            self.alive = {*self.alive, member.node}  # which may be younger than the last look
            self.overseer.joined(actor)
            self.lost = 0
        except GONE as error:
            said = f"an evaluator's process died {RETRIES + 1} times while it loaded; memory may have run out"
            self._lose(actor, error, said, "Give it a machine with more of it (`resources`), or a smaller `dtype`.")
        except NEVER_STARTED as error:
            said = f"an evaluator was never started: {_in_a_line(error)}"
            self._lose(actor, error, said, "See what Ray's logs on its node say.")
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, TransplantError | RuntimeError | OSError):
                raise
            self._refuse(actor, _node_of(actor), error)

    def _refuse(self, actor: ActorHandle, node: str | None, error: ray.exceptions.RayTaskError) -> None:
        """One that cannot load, or work, is left out. What is wrong with a node is wrong for all on it; a GPU may be alone in it.

        Raises what was wrong where there is nobody else, and no place is left to try.
        """
        known = 0 if node is None else self.refused.get(node, 0)
        if node is not None:
            self.refused[node] = known + (1 if _is_of_one_place(error) else WHOLE)
        self.left_out_at = time.monotonic()
        if not self.idle and not self.at_work and not self.size(self.refused):
            raise error
        if known < WHOLE:  # others had begun to load there
            self.note(f"an evaluator cannot load, or work, and is left out; the others go on: {error.cause}")
        ray.kill(actor)
        self.resized_at = -RESIZE_SECONDS  # at once: it may have been the only one

    def _lose(self, actor: ActorHandle, error: Exception, said: str, advice: str) -> None:
        """A newcomer of whom nothing came, wherever it was. ResourceError where there is nobody else."""
        ray.kill(actor)
        self.lost += 1
        self.left_out_at = time.monotonic()
        if not self.idle and not self.at_work and self.lost > len(self.joining):
            raise ResourceError(f"{said}. {advice}") from error
        self.note(f"{said}; the others go on")

    def _dismiss(self, member: Member, error: ray.exceptions.RayTaskError, variants: tuple[str, ...]) -> None:
        """A member that could not go on with these variants: its device failed, or it has come back on a node that is unfit.

        A process whose device has failed fails at all it is given, and faster than others work. Where there is no other place, a
        new process may find it well.
        """
        self.overseer.died(member.actor, variants)
        self.at_work.remove(member)
        node = _node_of(member.actor) or member.node  # it may have started again elsewhere since it joined
        if not (isinstance(error.cause, DeviceError) and self._is_the_only_place(node)):
            self._refuse(member.actor, node, error)
            return
        ray.kill(member.actor)
        self.resized_at = -RESIZE_SECONDS
        self.failures += 1
        if self.failures == MOST_FAILURES:
            raise error

    def _is_the_only_place(self, node: str) -> bool:
        return not self.size({**self.refused, node: self.refused.get(node, 0) + 1})

    def _forsake(self, running: dict[Any, tuple[Member, Task]]) -> Iterator[Task]:
        """Work in the hands of those whose node has been gone for a while, and nothing was heard of it."""
        for stream, (member, task) in list(running.items()):
            if member.node not in self.alive and member.node not in self.alive_before:
                self.overseer.died(member.actor, task.left)
                self.at_work.remove(member)
                ray.kill(member.actor)  # with the call that it may still be waiting with
                del running[stream]
                yield from task.after_a_death(member.node)

    def work_through(self, tasks: Iterable[Task], on_tick: Callable[[], None] = lambda: None) -> None:
        """Hand out all of them in order, as they are taken; what comes is taken in here, and what a death leaves comes first.

        `on_tick` is called all the while, every `RESIZE_SECONDS` or more often.
        """
        waiting, running = _Waiting(tasks), dict[Any, tuple[Member, Task]]()
        while True:
            on_tick()
            self._look_around()
            waiting.back(self._forsake(running))
            while waiting and (member := self.take()) is not None:
                task = waiting.take()
                self.overseer.handed_out(member.actor, len(task.left))
                running[task.start(member.actor)] = member, task
            if not running and not waiting:
                if self.grows:
                    self._let_go(len(self) - max(1, self.size(self.refused)))
                return
            self.resize(work_waits=bool(waiting))
            ready, _ = ray.wait([*running, *self.joining], num_returns=1, timeout=RESIZE_SECONDS)
            for stream in ready:
                if stream in self.joining:
                    self.welcome(stream)
                    continue
                member, task = running[stream]
                try:
                    if (ref := next(stream, None)) is not None:
                        task.take(ray.get(ref))
                        self.failures = 0
                        self.overseer.came(member.actor, len(task.left))
                        continue
                    self.give_back(member)
                except GONE:
                    self.died(member, task.left)
                    waiting.back(task.after_a_death(member.node))
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, (*UNFIT, DeviceError)):
                        raise
                    self._dismiss(member, error, task.left)
                    waiting.back(task.after_a_death(member.node))
                del running[stream]

    def dissolve(self) -> None:
        """They give their GPUs back."""
        for actor in [*self.joining.values(), *(member.actor for member in (*self.idle, *self.at_work))]:
            ray.kill(actor)

    def _join(self, actor: ActorHandle) -> None:
        self.joining[actor.join.options(max_task_retries=RETRIES).remote()] = actor


class _Waiting:
    """Tasks in their order; what was handed back comes first."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = iter(tasks)
        self.first: deque[Task] = deque()

    def __bool__(self) -> bool:
        if not self.first:
            self.first.extend(islice(self.tasks, 1))
        return bool(self.first)

    def take(self) -> Task:
        return self.first.popleft()

    def back(self, tasks: Iterable[Task]) -> None:
        self.first.extendleft(reversed(list(tasks)))


def _node_of(actor: ActorHandle) -> str | None:
    """Where an actor is that has just answered; None where it has died since."""
    try:
        return str(ray.get(actor.__ray_call__.options(max_task_retries=0).remote(_this_node), timeout=ANSWER_SECONDS))
    except (*GONE, ray.exceptions.GetTimeoutError):
        return None


def _is_of_one_place(error: ray.exceptions.RayTaskError) -> bool:
    """Whether others on the node may be well."""
    return isinstance(error.cause, DeviceError) or not isinstance(error.cause, TransplantError)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _this_node(_actor: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


def nodes_alive() -> Collection[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def fleet(
    start: Callable[[Refused], ActorHandle],
    size: Callable[[Refused], int],
    overseer: Overseer,
    note: Callable[[str], None],
    *,
    grows: bool = False,
) -> Iterator[Fleet]:
    """A fleet that is dissolved when the block ends."""
    gathered = Fleet(start, size, overseer, note, grows=grows)
    try:
        yield gathered
    finally:
        gathered.dissolve()
