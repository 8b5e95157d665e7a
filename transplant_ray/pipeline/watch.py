"""How a verb tells of its progress, to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Watch(Protocol):
    def stage(self, name: str, total: int) -> None:
        """A stage begins; `total` is how much `advance` will add up to, 0 where nobody knows."""

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None:
        """Something a user should read."""


class Silent:
    """Watches without a word; the default of the Python API."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None: ...


class Stopwatch:
    """Seconds per stage, for the summary."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[None]:
        self.watch.stage(name, total)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
