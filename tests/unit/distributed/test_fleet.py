"""Who is in the fleet as nodes come and go, without Ray: actors here are placed by hand, and answer from a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from transplant_ray.distributed import fleet as module
from transplant_ray.distributed.facts import AtWork, Fact
from transplant_ray.distributed.fleet import MOST_FAILURES, Fleet, fleet
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.room import Refused
from transplant_ray.errors import CheckpointError, DataError, DeviceError, ResourceError

LOST = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.ObjectLostError("00", None, ""),
    ray.exceptions.OwnerDiedError("00", None, ""),
    ray.exceptions.ObjectReconstructionFailedError("00", None, ""),
    ray.exceptions.OutOfMemoryError("too large"),
]


class Actor:
    """One that waits for a place, and then is on a node."""

    def __init__(self, name: str, avoided: frozenset[str]) -> None:
        self.avoided = avoided
        self.node: str | None = None
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.join = self._method("join")
        self.__ray_call__ = self._method("node")

    def _method(self, name: str) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: Ref(self, name)))


@dataclass(frozen=True, eq=False)
class Ref:
    actor: Actor
    method: str


class Silent:
    """A stream of which nothing comes."""


class Machines:
    """Stands for Ray: nodes with so many places each."""

    exceptions = ray.exceptions

    def __init__(self, **places: int) -> None:
        self.places = places
        self.spoilt: dict[str, Exception] = {}
        self.actors: list[Actor] = []

    def start(self, refused: Refused) -> Any:
        avoided = frozenset(node for node in refused if self.places.get(node, 0) <= refused[node])
        self.actors.append(Actor(f"{len(self.actors):012}", avoided))
        return self.actors[-1]

    def size(self, refused: Refused) -> int:
        return sum(max(0, number - refused.get(node, 0)) for node, number in self.places.items())

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True} for node in self.places]

    def kill(self, actor: Actor, *, no_restart: bool = True) -> None:
        actor.node = None
        if no_restart:
            self.actors.remove(actor)

    def wait(self, refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        assert refs, "Ray waits for nothing"
        for actor in self.actors:
            actor.node = actor.node if actor.node in self.places else None
        held = Counter(actor.node for actor in self.actors)
        for actor in (actor for actor in self.actors if actor.node is None):
            free = [node for node, number in self.places.items() if held[node] < number and node not in actor.avoided]
            actor.node = free[0] if free else None
            held[actor.node] += 1
        ready = [ref for ref in refs if not isinstance(ref, Silent) and (not isinstance(ref, Ref) or ref.actor.node is not None)]
        return ready[-1:], []

    def get(self, ref: Any, **_: Any) -> Any:
        if isinstance(ref, Exception):
            raise ref
        if not isinstance(ref, Ref):
            return ref
        if ref.method == "join" and ref.actor.node in self.spoilt:
            error = self.spoilt[str(ref.actor.node)]
            raise error if isinstance(error, ray.exceptions.RayError) else ray.exceptions.RayTaskError("join", "", error)
        return ref.actor.node


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    machines = Machines(one=1)
    monkeypatch.setattr(module, "ray", machines)
    monkeypatch.setattr(module, "RESIZE_SECONDS", 0.0)
    return machines


@dataclass
class Task:
    """Gives what it is told to, or raises it."""

    name: str
    gives: list[Any]
    done: list[str] = field(default_factory=list)
    on_take: Callable[[], None] = lambda: None
    left: tuple[str, ...] = ("v",)

    def start(self, actor: Actor) -> Any:
        assert actor.node is not None
        gives = self.gives.pop(0)
        return gives if isinstance(gives, Silent) else iter([gives])

    def take(self, found: Any) -> None:
        self.on_take()
        self.done.append(f"{self.name}: {found}")

    def after_a_death(self, node: str) -> list[Task]:
        self.done.append(f"{self.name}: lost on {node}")
        return [self]


@pytest.mark.parametrize("lost", LOST, ids=lambda error: type(error).__name__)
def test_what_is_lost_with_its_node_is_handed_out_again(machines: Machines, lost: Exception) -> None:
    """A large answer stays where it was made till it is read: its loss comes as the loss of an object."""
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through([Task("a", [lost, 1], done), Task("b", [2], done)])
    assert done == ["a: lost on one", "a: 1", "b: 2"]


def failing(error: Exception) -> Exception:
    return ray.exceptions.RayTaskError("evaluate", "", error)


def test_one_whose_device_fails_starts_again_and_another_does_its_work(machines: Machines) -> None:
    """It would fail at all it is given, and faster than others work."""
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through([Task("a", [failing(DeviceError("no longer computes")), 1], done), Task("b", [2], done)])
        assert len(machines.actors) == len(gathered) == 1
        assert not gathered.refused, "its process may have been all that was wrong"
    assert done == ["a: lost on one", "a: 1", "b: 2"]


def test_one_whose_device_fails_beside_others_is_left_out_with_its_place_alone(machines: Machines) -> None:
    done: list[str] = []
    notes: list[str] = []
    machines.places = {"one": 3}
    with fleet(machines.start, machines.size, Overseer(), notes.append) as gathered:
        gathered.work_through([Task("a", [failing(DeviceError("no longer computes")), 1], done)])
        assert gathered.refused == {"one": 1}
        settle(machines, gathered)
        assert len(machines.actors) == 2
    assert (done, len(notes)) == (["a: lost on one", "a: 1"], 1)


def test_the_only_device_may_fail_so_often_in_a_row_and_no_more(machines: Machines) -> None:
    error = failing(DeviceError("no longer computes"))
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through([Task(str(i), [*[error] * (MOST_FAILURES - 1), i], done) for i in range(3)])
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            gathered.work_through([Task("a", [error] * MOST_FAILURES, done)])
        assert isinstance(raised.value.cause, DeviceError)


def test_places_where_nobody_came_up_are_not_those_of_whoever_starts_again(machines: Machines) -> None:
    gathered = gather(machines, [])
    machines.places = {"one": 1, "small": 8}
    machines.spoilt["small"] = LOST[0]
    settle(machines, gathered)
    machines.places = {"one": 1, "two": 1}
    settle(machines, gathered)
    assert gathered.lost > 1
    member = gathered.take()
    assert member is not None
    gathered.died(member, ())
    gathered.resize()
    assert len(machines.actors) == 1, "it starts again, and is not let go of for others who came to nothing elsewhere"


def test_one_that_came_back_on_a_node_that_is_unfit_is_left_out(machines: Machines) -> None:
    done: list[str] = []
    notes: list[str] = []
    machines.places = {"one": 1, "two": 1}
    with fleet(machines.start, machines.size, Overseer(), notes.append) as gathered:
        gathered.work_through([Task("a", [failing(CheckpointError("other bytes")), 1], done)])
        assert len(gathered.refused) == 1
    assert (done[-1], len(notes)) == ("a: 1", 1)


def test_the_node_that_is_unfit_is_the_one_where_it_came_back(machines: Machines) -> None:
    @dataclass
    class Moving(Task):
        def start(self, actor: Actor) -> Any:
            machines.places["bad"], actor.node = 1, "bad" if len(self.gives) == 2 else actor.node
            machines.spoilt["bad"] = CheckpointError("other bytes")
            return super().start(actor)

    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through([Moving("a", [failing(CheckpointError("other bytes")), 1], [])])
        assert list(gathered.refused) == ["bad"]
        assert [member.node for member in gathered.idle] == ["one"]


def test_an_error_of_the_work_is_raised(machines: Machines) -> None:
    with fleet(machines.start, machines.size, Overseer(), print) as gathered, pytest.raises(ray.exceptions.RayTaskError):
        gathered.work_through([Task("a", [failing(DataError("too long"))], [])])


def test_an_idle_one_whose_node_has_gone_is_given_nothing_before_it_has_joined_again(machines: Machines) -> None:
    """A call to it would wait for its restart, and for ever where there is no room."""
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through([Task("a", [1], done)])
        machines.places = {"two": 1}
        gathered.work_through([Task("b", [2], done)])
        assert [member.node for member in gathered.idle] == ["two"]
    assert done == ["a: 1", "b: 2"]


def test_work_of_one_whose_node_has_gone_without_a_word_is_done_by_another(machines: Machines) -> None:
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:

        def look() -> None:
            if gathered.at_work:
                machines.places = {"two": 1}

        gathered.work_through([Task("a", [Silent(), 1], done)], look)
    assert done == ["a: lost on one", "a: 1"]


@pytest.mark.parametrize(
    "error",
    [ray.exceptions.RuntimeEnvSetupError("no room in /tmp"), ray.exceptions.ActorUnschedulableError("no such label"), LOST[0]],
    ids=lambda error: type(error).__name__,
)
def test_a_node_on_which_nobody_comes_up_is_not_tried_without_end(
    machines: Machines, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    gathered = gather(machines, notes)
    machines.places["small"] = 1
    machines.spoilt["small"] = error
    for _ in range(5):
        settle(machines, gathered)
    assert [actor.node for actor in machines.actors] == ["one"]
    assert len(notes) == 1
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    machines.spoilt.clear()
    settle(machines, gathered)
    assert sorted(str(actor.node) for actor in machines.actors) == ["one", "small"], "later it is tried again"


def test_where_nobody_comes_up_at_all_that_is_the_end(machines: Machines) -> None:
    machines.spoilt["one"] = ray.exceptions.RuntimeEnvSetupError("no room in /tmp")
    with pytest.raises(ResourceError, match=r"never started: .*no room in /tmp.* See what Ray's logs"):
        gather(machines, [])


def gather(machines: Machines, notes: list[str]) -> Fleet:
    """Until nobody comes any more."""
    gathered = Fleet(machines.start, machines.size, Overseer(), notes.append)
    settle(machines, gathered)
    return gathered


def settle(machines: Machines, gathered: Fleet) -> None:
    gathered.resize()
    while gathered.joining and (ready := machines.wait(list(gathered.joining))[0]):
        gathered.welcome(ready[0])
        gathered.resize()


def test_a_cluster_that_grows_is_shown_one_more_than_it_has_room_for_as_long_as_work_waits(machines: Machines) -> None:
    facts: list[Fact] = []
    waiting: list[int] = []
    done: list[str] = []

    def look() -> None:
        waiting.append(sum(actor.node is None for actor in machines.actors))
        if len(waiting) == 3:
            machines.places["two"] = 1  # what was asked for has come

    with fleet(machines.start, machines.size, Overseer(facts.append), print, grows=True) as gathered:
        gathered.work_through(Task(str(number), [number], done, look) for number in range(8))
        assert len(machines.actors) == len(gathered) == 2, "whoever waits in vain was let go"
    assert len(done) == 8
    assert waiting[0] == 1
    assert max(waiting) == 1
    assert waiting[-1] == 0, "no work waits any more"
    assert max(fact.of for fact in facts if isinstance(fact, AtWork)) == 2
    assert not machines.actors


def test_a_cluster_that_does_not_grow_is_asked_for_nothing(machines: Machines) -> None:
    done: list[str] = []
    with fleet(machines.start, machines.size, Overseer(), print) as gathered:
        gathered.work_through(Task(str(number), [number], done) for number in range(4))
        assert len(machines.actors) == 1


def test_a_node_that_was_refused_is_not_tried_again_and_its_place_is_not_lost_when_it_leaves(machines: Machines) -> None:
    notes: list[str] = []
    machines.places["bad"] = 2
    machines.spoilt["bad"] = ResourceError("other versions")
    gathered = gather(machines, notes)
    assert [actor.node for actor in machines.actors] == ["one"]
    assert notes == ["an evaluator cannot load, or work, and is left out; the others go on: other versions"], "once for a node"
    machines.places["three"] = 1
    settle(machines, gathered)
    assert sorted(str(actor.node) for actor in machines.actors) == ["one", "three"]
    del machines.places["bad"]
    machines.places["four"] = 2
    settle(machines, gathered)
    assert sorted(str(actor.node) for actor in machines.actors) == ["four", "four", "one", "three"]
    assert not gathered.refused
    assert len(notes) == 1


def test_one_gpu_that_fails_does_not_rule_out_those_beside_it(machines: Machines) -> None:
    machines.places = {"one": 3}
    gathered = Fleet(machines.start, machines.size, Overseer(), print)
    machines.spoilt["one"] = RuntimeError("out of memory")
    gathered.welcome(machines.wait(list(gathered.joining))[0][0])
    machines.spoilt.clear()
    settle(machines, gathered)
    assert [actor.node for actor in machines.actors] == ["one", "one"]


def test_where_one_is_asked_for_and_cannot_load_another_place_is_tried(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.places["two"] = 1
    machines.spoilt["one"] = ResourceError("other versions")
    monkeypatch.setattr(module, "RESIZE_SECONDS", 1000.0)
    with fleet(machines.start, lambda refused: min(1, machines.size(refused)), Overseer(), print) as gathered:
        gathered.work_through([Task("a", [1], [])])
        assert [member.node for member in gathered.idle] == ["two"]


def test_where_no_place_is_left_what_kept_them_from_loading_is_raised(machines: Machines) -> None:
    machines.places = {"one": 2, "two": 1}
    machines.spoilt = dict.fromkeys(machines.places, ResourceError("other versions"))
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        gather(machines, [])
    assert str(raised.value.cause) == "other versions"
