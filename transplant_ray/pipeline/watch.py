"""How a verb tells of its progress, to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from transplant_ray.distributed.facts import Fact, Note, StageBegins, StageEnds


class Watch(Protocol):
    def stage(self, name: str, total: int, unit: str = "examples") -> None:
        """A stage begins; `total` is how much `advance` will add up to, of which unit; 0 where nobody knows."""

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None:
        """Something a user should read."""

    def hear(self, fact: Fact) -> None:
        """What has happened, in any thread; take of it what you like."""


class Silent:
    """Watches without a word; the default of the Python API."""

    def stage(self, name: str, total: int, unit: str = "examples") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None: ...

    def hear(self, fact: Fact) -> None: ...


class Listener(Protocol):
    """Who wants facts alone."""

    def hear(self, fact: Fact) -> None: ...


class Watches:
    """One watch, and others who hear the facts; a stage that begins and a note are facts too."""

    def __init__(self, watch: Watch, listeners: Sequence[Listener]) -> None:
        self.watch, self.listeners = watch, listeners

    def stage(self, name: str, total: int, unit: str = "examples") -> None:
        self.watch.stage(name, total, unit)
        self.hear(StageBegins(name, total, unit))

    def advance(self, amount: int) -> None:
        self.watch.advance(amount)

    def note(self, text: str) -> None:
        self.watch.note(text)
        self.hear(Note(text))

    def hear(self, fact: Fact) -> None:
        for listener in (self.watch, *self.listeners):
            listener.hear(fact)


class Stopwatch:
    """Seconds per stage, for the summary."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 0, unit: str = "examples") -> Iterator[None]:
        self.watch.stage(name, total, unit)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = round(time.perf_counter() - start, 3)
            self.seconds[name] = round(self.seconds.get(name, 0) + seconds, 3)
            self.watch.hear(StageEnds(name, seconds))
