"""The outbox against a server that fails as it is told, with a clock that only moves when somebody sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from transplant_ray.errors import TrackingError
from transplant_ray.tracking.outbox import LAST_FAILURES, LONGEST_PAUSE, Outbox


class Away(Exception):
    """Nobody answers."""


class Refused(Exception):
    """The server does not want it."""


@dataclass
class Server:
    """What arrived, in order; each entry first fails with the errors that are planned for it."""

    arrived: list[str] = field(default_factory=list)
    tries: list[tuple[str, bool]] = field(default_factory=list)
    planned: dict[str, list[Exception]] = field(default_factory=dict)
    dead: bool = False

    def take(self, name: str) -> Callable[[bool], str]:
        def call(again: bool) -> str:
            self.tries.append((name, again))
            if self.dead:
                raise Away("connection refused")
            if self.planned.get(name):
                raise self.planned[name].pop(0)
            self.arrived.append(name)
            return f"answer to {name}"

        return call


@dataclass
class Clock:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)
    asked_by_main: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> float:
        if threading.current_thread() is threading.main_thread():
            self.asked_by_main.set()
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def until_drained(self, _: bool) -> None:
        """A call that ends when `drain` has begun: until then nothing behind it is tried."""
        assert self.asked_by_main.wait(60)


@dataclass
class Made:
    box: Outbox
    server: Server
    clock: Clock
    said: list[str]


@pytest.fixture
def made() -> Made:
    clock, said = Clock(), []
    return Made(Outbox(lambda error: isinstance(error, Away), said.append, clock=clock, sleep=clock.sleep), Server(), clock, said)


def test_what_fails_for_want_of_a_server_is_tried_again_and_the_order_is_kept(made: Made) -> None:
    made.server.planned = {"b": [Away("1"), Away("2"), Away("3")]}
    answers = [made.box.post(name, made.server.take(name)) for name in "abc"]
    assert made.box.drain(600) == 0
    assert made.server.arrived == ["a", "b", "c"]
    assert [answer.result() for answer in answers] == ["answer to a", "answer to b", "answer to c"]
    assert made.server.tries == [("a", False), ("b", False), ("b", True), ("b", True), ("b", True), ("c", False)]
    assert made.box.refused == []


def test_pauses_double_up_to_the_longest(made: Made) -> None:
    made.server.planned = {"a": [Away(str(n)) for n in range(8)]}
    made.box.post("a", made.server.take("a"))
    made.box.drain(600)
    assert made.clock.slept == [0.5, 1, 2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_while_the_sweep_runs_it_never_gives_up(made: Made) -> None:
    made.server.planned = {"a": [Away(str(n)) for n in range(5000)]}
    assert made.box.post("a", made.server.take("a")).result(60) == "answer to a"
    assert made.clock.now > 20 * 3600


def test_an_outage_is_said_once_and_so_is_its_end(made: Made) -> None:
    made.server.planned = {"a": [Away("http://me:open-sesame@host:1 is gone\nand more"), Away("2")], "b": [Away("3")]}
    for name in "ab":
        made.box.post(name, made.server.take(name))
    made.box.drain(600)
    away, back, *second = made.said
    assert away.startswith("MLflow does not answer (http://host:1 is gone): ")
    assert back.startswith("MLflow answers again; ")
    assert len(second) == 2
    assert "sesame" not in "".join(made.said)


def test_what_is_refused_is_said_and_counted_and_the_next_go_on(made: Made) -> None:
    made.server.planned = {"b": [Refused("a key of //me:open-sesame@host is too long")]}
    _, b, c = (made.box.post(name, made.server.take(name)) for name in "abc")
    assert made.box.drain(600) == 0
    assert made.server.arrived == ["a", "c"]
    assert made.box.refused == ["b: a key of //host is too long"]
    assert made.said == ["MLflow refused b: a key of //host is too long"]
    assert c.result() == "answer to c"
    with pytest.raises(TrackingError, match="b was refused"):
        b.result()


def test_what_needs_a_refused_answer_is_counted_but_not_sent(made: Made) -> None:
    made.server.planned = {"run": [Refused("no")]}
    run = made.box.post("run", made.server.take("run"))
    made.box.post("numbers", lambda again: made.server.take(run.result())(again))
    made.box.post("other", made.server.take("other"))
    assert made.box.drain(600) == 0
    assert made.server.arrived == ["other"]
    assert made.box.refused == ["run: no", "numbers: run was refused"]
    assert len(made.said) == 1


def test_only_the_first_refusals_are_said(made: Made) -> None:
    names = [f"entry {n}" for n in range(50)]
    made.server.planned = {name: [Refused("no")] for name in names}
    for name in names:
        made.box.post(name, made.server.take(name))
    made.box.drain(600)
    assert len(made.box.refused) == 50
    assert len(made.said) == 3


def test_a_drain_gives_up_when_the_patience_is_over(made: Made) -> None:
    made.server.dead = True
    made.box.post("gate", made.clock.until_drained)
    for n in range(12):
        made.box.post(f"entry {n}", made.server.take(f"entry {n}"))
    assert made.box.drain(600) == 12
    assert made.clock.now == 600
    assert {name for name, _ in made.server.tries} == {f"entry {n}" for n in range(LAST_FAILURES)}
    assert made.server.arrived == []
    assert made.said == ["MLflow does not answer (connection refused): 12 entries wait, up to 600 s"]


def test_a_drain_that_finds_the_server_away_says_how_long_it_waits(made: Made) -> None:
    made.server.dead = True
    first = threading.Event()
    made.box.post("entry", lambda again: (first.set(), made.server.take("entry")(again)))
    assert first.wait(60)
    while not made.said:  # the first try has failed
        first.wait(0.01)
    assert made.box.drain(30) == 1
    assert made.said[-1] == "MLflow does not answer: 1 entry waits, up to 30 s"


def test_a_server_that_comes_back_in_time_gets_everything(made: Made) -> None:
    made.server.planned = {"0": [Away(str(n)) for n in range(30)]}
    made.box.post("gate", made.clock.until_drained)
    for n in range(5):
        made.box.post(str(n), made.server.take(str(n)))
    assert made.box.drain(600) == 0
    assert made.server.arrived == ["0", "1", "2", "3", "4"]


def test_one_that_the_server_cannot_bear_does_not_take_the_others_with_it(made: Made) -> None:
    made.server.planned = {"huge": [Away("504") for _ in range(10_000)]}
    for name in ("a", "huge", "b"):
        made.box.post(name, made.server.take(name))
    assert made.box.drain(60) == 0
    assert made.server.arrived == ["a", "b"]
    assert made.box.refused == ["huge: 504"]


def test_a_slow_call_does_not_use_up_the_patience(made: Made) -> None:
    def upload(_: bool) -> None:
        made.clock.now += 10_000

    made.server.planned = {"after": [Away("1"), Away("2")]}
    made.box.post("upload", upload)
    made.box.post("after", made.server.take("after"))
    assert made.box.drain(60) == 0
    assert made.server.arrived == ["after"]


def test_closing_drops_what_waits_and_does_not_wait_for_what_hangs(made: Made) -> None:
    hanging, released = threading.Event(), threading.Event()

    def hang(_: bool) -> None:
        hanging.set()
        released.wait(60)

    made.box.post("hangs", hang)
    dropped = made.box.post("dropped", made.server.take("dropped"))
    assert hanging.wait(60)
    made.box.close(within=0.01)
    assert dropped.cancelled()
    assert made.box.post("too late", made.server.take("too late")).cancelled()
    released.set()
    assert made.server.arrived == []


def test_closing_lets_arrive_what_can(made: Made) -> None:
    for n in range(100):
        made.box.post(str(n), made.server.take(str(n)))
    made.box.close(within=60)
    assert len(made.server.arrived) == 100


def test_closing_does_not_wait_for_a_server_that_is_away(made: Made) -> None:
    made.server.dead = True
    waiting = made.box.post("a", made.server.take("a"))
    made.box.close(within=3600)
    assert made.server.tries
    assert not waiting.done() or waiting.cancelled()


def test_a_listener_that_fails_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def say(_: str) -> None:
        raise RuntimeError("the terminal is gone")

    box, server = Outbox(lambda _: True, say), Server(dead=True)
    box.post("a", server.take("a"))
    assert box.drain(600) == 1
