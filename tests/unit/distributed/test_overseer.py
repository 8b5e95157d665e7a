"""Who is told what of the pool, and how its work is ended early: at once, and before anything that it needs is taken away."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from transplant_ray.distributed import overseer as module
from transplant_ray.distributed.facts import AtWork, EvaluatorDied, EvaluatorJoined, EvaluatorRestarted, Fact
from transplant_ray.distributed.overseer import Overseer, Stopped, working


class FakeEvaluator:
    def __init__(self, name: str) -> None:
        self._actor_id = SimpleNamespace(hex=lambda: name * 16)


ONE, OTHER = FakeEvaluator("aa"), FakeEvaluator("bb")
ONE_ID, OTHER_ID = "a" * 12, "b" * 12


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    killed: list[Any] = []
    monkeypatch.setattr(module.ray, "kill", killed.append)
    return killed


def test_it_tells_who_comes_and_goes_and_how_many_work() -> None:
    told: list[Fact] = []
    overseer = Overseer(told.append, gpus_each=0.5)
    for evaluator in (ONE, OTHER):
        overseer.joined(evaluator)
    overseer.handed_out(ONE, 2)
    overseer.handed_out(OTHER, 1)
    overseer.came(ONE, 1)  # it has more to do
    overseer.came(ONE, 0)
    overseer.died(OTHER, ("v",))
    overseer.joined(OTHER)
    assert told == [
        EvaluatorJoined(ONE_ID), AtWork(0, 1, 0), EvaluatorJoined(OTHER_ID), AtWork(0, 2, 0), AtWork(1, 2, 0.5), AtWork(2, 2, 1.0),
        AtWork(1, 2, 0.5), EvaluatorDied(OTHER_ID, ("v",)), AtWork(0, 1, 0), EvaluatorRestarted(OTHER_ID), AtWork(0, 2, 0),
    ]  # fmt: skip


def test_once_stopped_nobody_goes_on(killed: list[Any]) -> None:
    overseer = Overseer()
    overseer.joined(ONE)
    overseer.stop()
    assert killed == [ONE]
    for fact in (lambda: overseer.handed_out(ONE, 1), lambda: overseer.died(ONE, ()), lambda: overseer.joined(ONE)):
        with pytest.raises(Stopped):
            fact()


def test_work_is_waited_for_and_its_error_is_raised_and_told() -> None:
    failures: list[str] = []
    done: list[int] = []
    with working(lambda: done.append(1), failures.append, stop=lambda: done.append(2)):
        pass
    assert (done, failures) == ([1], [])

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), working(fail, failures.append, stop=lambda: None):
        pass
    assert failures == ["ValueError('no')"]


def test_work_that_is_left_early_is_stopped_and_waited_for(killed: list[Any]) -> None:  # noqa: ARG001
    overseer, begun, woken, kept = Overseer(), threading.Event(), threading.Event(), list[str]()
    failures: list[str] = []

    def work() -> None:
        try:
            begun.set()
            woken.wait(30)  # as for an evaluator, until it is killed
            overseer.died(ONE, ())
        finally:
            kept.append("ledger")

    def stop() -> None:
        overseer.stop()
        woken.set()

    def leave() -> None:
        with working(work, failures.append, stop):
            begun.wait(30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert kept == ["ledger"], "written before the block is left"
    assert failures == [], "there is nobody left who could be told"
