"""Tutors: the processes that carry out the trainings of a comparison, each with the GPU or the CPUs of one.

A process imports torch once and takes one lesson after another. One that dies comes back, and the lesson goes on from its own
checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
import transformers
from ray.actor import ActorHandle

from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.facts import Fact, LessonBegins, LessonDone, LessonFact, LessonFailed
from transplant_ray.distributed.fleet import MOST_NODES, Fleet, fleet, nodes_alive
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.preflight import Needs, check_node
from transplant_ray.distributed.room import Refused
from transplant_ray.errors import TransplantError
from transplant_ray.models.loading import check_devices, placement
from transplant_ray.organ.lessons import Learnt, Lesson, carry_out, failed
from transplant_ray.organ.training import Point
from transplant_ray.recipe import ResourceSpec, RoomSpec

OnPoint = Callable[[Lesson, Point], None]
OnLearnt = Callable[[Learnt], None]


def resources_of(asked: RoomSpec) -> ResourceSpec:
    """As `connect` and `wait_for_room` take them."""
    return ResourceSpec(
        address=asked.address, gpus_per_model=asked.gpus, cpus_per_model=asked.cpus, evaluators="auto", wait=asked.wait
    )


@ray.remote
class Tutor:
    def __init__(self, asked: RoomSpec, needs: Needs) -> None:
        torch.set_num_threads(asked.cpus)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.num_gpus, self.needs = asked.gpus, needs

    def join(self) -> str:
        check_node(self.needs.versions, self.needs.samples, self.needs.checkpoints.values())
        return str(ray.get_runtime_context().get_node_id())

    def carry_out(self, lesson: Lesson) -> Iterator[Point | Learnt]:
        """Points as they are reached, and at the end what was learnt; an error of ours would come again, so it is learnt too.

        DeviceError where it is the device that fails.
        """
        device = torch.device(placement(self.num_gpus))
        try:
            yield from carry_out(lesson, device)
        except (TransplantError, RuntimeError) as error:  # torch reports what a device cannot do as RuntimeError
            check_devices(device)
            yield failed(lesson, f"{type(error).__name__}: {error}")


@dataclass
class Tutors:
    """As many as there is room for, from the first lesson on."""

    asked: RoomSpec
    needs: Needs
    """What each must find on its node."""
    most: int
    note: Callable[[str], None]
    tell: Callable[[Fact], None]
    """Of tutors that come and go, and of lessons that begin and end."""
    held: ExitStack
    """What ends with the block."""
    gathered: Fleet | None = None

    def carry_out(self, lessons: Sequence[Lesson], on_point: OnPoint, on_learnt: OnLearnt) -> dict[str, Learnt]:
        """All of them, as many side by side as there is room for; what came of each, by key.

        Both callbacks are called in this thread. A lesson that cannot be carried out is learnt as failed.
        """
        course = _Course(self.asked.max_failures, on_point, on_learnt, self.tell)
        self._fleet().work_through(_Task(course, lesson) for lesson in lessons)
        return course.learnt

    def _fleet(self) -> Fleet:
        if self.gathered is None:
            capacity = Capacity(resources_of(self.asked))

            def start(refused: Refused) -> ActorHandle:
                return capacity.start(Tutor, "evaluator", self.asked, self.needs, refused=refused)

            def size(refused: Refused) -> int:
                return min(self.most, capacity.evaluators(refused))

            overseer = Overseer(self.tell, self.asked.gpus)
            self.gathered = self.held.enter_context(fleet(start, size, overseer, self.note, grows=capacity.grows))
        return self.gathered


@contextmanager
def tutors(
    asked: RoomSpec, needs: Needs, most: int, note: Callable[[str], None], tell: Callable[[Fact], None] = lambda _: None
) -> Iterator[Tutors]:
    """At most so many tutors, for the block."""
    with ExitStack() as held:
        yield Tutors(asked, needs, most, note, tell, held)


@dataclass
class _Course:
    max_failures: int
    on_point: OnPoint
    on_learnt: OnLearnt
    tell: Callable[[Fact], None]
    deaths: Counter[str] = field(default_factory=Counter)
    """Of tutors over a lesson, on nodes that stayed."""
    with_nodes: Counter[str] = field(default_factory=Counter)
    """Of those that went with their nodes, since the training was further than ever before."""
    furthest: Counter[str] = field(default_factory=Counter)
    """The step that it has reached."""
    learnt: dict[str, Learnt] = field(default_factory=dict)

    def learn(self, learnt: Learnt) -> None:
        self.learnt[learnt.key] = learnt
        self.tell(_ended(learnt))
        self.on_learnt(learnt)


def _ended(learnt: Learnt) -> LessonFact:
    about = (learnt.name, learnt.model, learnt.method, learnt.stage, learnt.lr, learnt.seed)
    if learnt.error is not None:
        return LessonFailed(*about, learnt.error)
    return LessonDone(*about, round(learnt.seconds, 3), learnt.select)


@dataclass(frozen=True)
class _Task:
    course: _Course
    lesson: Lesson

    @property
    def left(self) -> tuple[str, ...]:
        return () if self.lesson.key in self.course.learnt else (self.lesson.name,)

    def start(self, actor: ActorHandle) -> Any:
        lesson = self.lesson
        self.course.tell(LessonBegins(lesson.name, lesson.model, lesson.method, lesson.stage, lesson.lr, lesson.seed))
        return actor.carry_out.options(num_returns="streaming", max_task_retries=0).remote(self.lesson)

    def take(self, found: Point | Learnt) -> None:
        if isinstance(found, Learnt):
            self.course.learn(found)
            return
        if found.step > self.course.furthest[self.lesson.key]:
            self.course.furthest[self.lesson.key] = found.step
            self.course.with_nodes.pop(self.lesson.key, None)
        self.course.on_point(self.lesson, found)

    def after_a_death(self, node: str) -> list[_Task]:
        """A death with the whole node counts for less."""
        course, key = self.course, self.lesson.key
        (course.deaths if node in nodes_alive() else course.with_nodes)[key] += 1
        if not self.left:
            return []
        if course.deaths[key] <= course.max_failures and course.with_nodes[key] < MOST_NODES:
            return [self]
        reason = f"its process died {course.deaths[key] + course.with_nodes[key]} times; memory may have run out"
        self.course.learn(failed(self.lesson, f"{reason}. The same command tries again"))
        return []
