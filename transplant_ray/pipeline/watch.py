"""How a verb tells of its progress, to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from transplant_ray.distributed.facts import Fact, Note, Paced, StageBegins, StageEnds
from transplant_ray.pipeline.pace import Pace

PACE_SECONDS = 5.0
"""Between two facts of the pace, at least."""


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
    """One watch, and others who hear the facts; a stage that begins, its pace and a note are facts too."""

    def __init__(self, watch: Watch, listeners: Sequence[Listener], pace: Pace | None = None) -> None:
        self.watch, self.listeners, self.pace = watch, listeners, pace or Pace()
        self.paced_at = self.pace.clock()

    def stage(self, name: str, total: int, unit: str = "examples") -> None:
        self.pace.begin(name, total, unit)
        self.watch.stage(name, total, unit)
        self.hear(StageBegins(name, total, unit))

    def advance(self, amount: int) -> None:
        self.pace.advance(amount)
        self.watch.advance(amount)
        if self.pace.clock() - self.paced_at >= PACE_SECONDS:
            self.paced_at = self.pace.clock()
            self.hear(Paced(self.pace.tokens_per_second, self.pace.seconds_left))

    def note(self, text: str) -> None:
        self.watch.note(text)
        self.hear(Note(text))

    def hear(self, fact: Fact) -> None:
        for listener in (self.pace, self.watch, *self.listeners):
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
