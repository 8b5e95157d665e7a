"""What is told of lessons that are handed out, come back, fail, or whose tutor dies. That tutors train is in tests/integration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transplant_ray.distributed import lessons as module
from transplant_ray.distributed.facts import Fact, LessonBegins, LessonDone, LessonFailed
from transplant_ray.distributed.fleet import MOST_NODES
from transplant_ray.distributed.lessons import _Course, _Task
from transplant_ray.organ.lessons import Learnt, Lesson, failed
from transplant_ray.organ.training import Point
from transplant_ray.recipe import TrainingSpec

KEY = "0123456789abcdef" * 4
NAME = KEY[:24]
LESSON = Lesson(
    key=KEY, model="m", method="full", stage="tune", recipient=None, learner=object(),
    spec=TrainingSpec(data=("text",), lr=0.5, seed=7), text=Path(), measured={}, folder=Path(NAME), keep=False,
)  # type: ignore[arg-type]  # fmt: skip
POINT = Point(8, 64, 1.5, 0.5)
ABOUT = (NAME, "m", "full", "tune", 0.5, 7)


@pytest.fixture
def told() -> list[Fact]:
    return []


@pytest.fixture
def task(told: list[Fact], monkeypatch: pytest.MonkeyPatch) -> _Task:
    """Of a course that gives a lesson up at the second death on a node that stays."""
    monkeypatch.setattr(module, "nodes_alive", lambda: {"here"})
    return _Task(_Course(1, lambda *_: None, lambda _: None, told.append), LESSON)


def hand_out(task: _Task) -> None:
    call: Any = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda lesson: lesson))
    assert task.start(SimpleNamespace(carry_out=call)) is LESSON  # type: ignore[arg-type]


def test_it_begins_and_is_done_with_its_loss_and_seconds(task: _Task, told: list[Fact]) -> None:
    hand_out(task)
    assert task.left == (NAME,)
    task.take(Learnt(KEY, "m", "full", "tune", 0.5, 7, select=3.5, seconds=1.23456))
    assert told == [LessonBegins(*ABOUT), LessonDone(*ABOUT, 1.235, 3.5)]
    assert task.left == ()


def test_one_that_diverges_has_failed_with_its_reason(task: _Task, told: list[Fact]) -> None:
    task.take(failed(LESSON, "the loss is nan"))
    assert told == [LessonFailed(*ABOUT, "the loss is nan")]


def test_after_a_death_it_begins_again_and_is_given_up_at_last(task: _Task, told: list[Fact]) -> None:
    for node in ("gone", "here"):  # the first death was with the whole node
        hand_out(task)
        assert task.after_a_death(node) == [task]
    hand_out(task)
    assert task.after_a_death("here") == []
    *begun, last = told
    assert begun == [LessonBegins(*ABOUT)] * 3
    assert isinstance(last, LessonFailed)
    assert "died 3 times; memory may have run out" in last.error


def test_one_that_takes_node_after_node_with_it_is_given_up_too(task: _Task, told: list[Fact]) -> None:
    for _ in range(MOST_NODES - 1):
        assert task.after_a_death("gone") == [task]
    task.take(POINT)
    assert task.after_a_death("gone") == [task], "it has come further"
    task.take(POINT)
    for _ in range(MOST_NODES - 2):
        assert task.after_a_death("gone") == [task]
    assert task.after_a_death("gone") == []
    assert isinstance(told[-1], LessonFailed)
