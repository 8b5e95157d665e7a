"""A stream that breaks goes on where it broke, whoever was lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from transplant_ray.distributed import streams
from transplant_ray.distributed.streams import MOST_BREAKS, steady

DEAD = ray.exceptions.ActorDiedError()
LOST = ray.exceptions.ObjectReconstructionFailedError("00", None, "")


class Actor:
    """Its streams, one after another, are told beforehand."""

    def __init__(self, *streams: Sequence[Any]) -> None:
        self.streams = list(streams)
        self.waits = 0
        self.__ray_ready__ = SimpleNamespace(remote=self._ready)

    def _ready(self) -> bool:
        self.waits += 1
        return True

    def begin(self) -> Iterator[Any]:
        return iter(self.streams.pop(0))


@pytest.fixture(autouse=True)
def _get(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(ref: Any) -> Any:
        if isinstance(ref, Exception):
            raise ref
        return ref

    monkeypatch.setattr(streams.ray, "get", get)


def read(actor: Any) -> list[Any]:
    return list(steady(actor, actor.begin))


@pytest.mark.parametrize(
    "broken",
    [
        [[DEAD], ["a", "b"]],
        [["a", DEAD], ["a", "b"]],
        [["a", LOST], [DEAD], ["a", "b"]],
        [["a", "b", DEAD], ["a", "b"]],
    ],
)
def test_each_item_comes_once(broken: list[list[Any]]) -> None:
    actor = Actor(*broken)
    assert read(actor) == ["a", "b"]
    assert actor.waits == len(broken) - 1, "it is begun again when the actor is back"


def test_the_first_stream_is_begun_before_it_is_read() -> None:
    actor: Any = Actor(["a"])
    stream = steady(actor, actor.begin)
    assert not actor.streams
    assert list(stream) == ["a"]


def test_a_stream_that_breaks_at_one_item_again_and_again_is_given_up_and_one_that_gets_on_is_not() -> None:
    with pytest.raises(ray.exceptions.ActorDiedError):
        read(Actor(*[["a", DEAD]] * MOST_BREAKS))
    far = [*[[*range(number), DEAD] for number in range(3 * MOST_BREAKS)], range(3 * MOST_BREAKS)]
    assert read(Actor(*far)) == list(range(3 * MOST_BREAKS))


def test_an_error_of_the_actor_is_no_break() -> None:
    failed = ray.exceptions.RayTaskError("collect", "", DEAD).as_instanceof_cause()
    assert isinstance(failed, ray.exceptions.RayActorError), "of whom it had waited for"
    actor = Actor([failed])
    with pytest.raises(ray.exceptions.RayTaskError):
        read(actor)
    assert not actor.waits
