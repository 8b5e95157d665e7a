"""What a server is to be told: kept in order while it does not answer, and sent when it does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transplant_ray.errors import TrackingError
from transplant_ray.recipe import redact

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before an entry is tried again: twice as many each time."""
LAST_FAILURES = 3
"""Once the patience is over, entries in a row that fail before the server counts as away: one may be more than it can bear."""
SHOWN_REFUSALS = 3

T = TypeVar("T")
Call = Callable[[bool], T]
"""Sends one entry. Its argument: whether it was tried before, and so may have arrived although no answer came."""


@dataclass(frozen=True)
class _Entry:
    what: str
    call: Call[Any]
    answer: Future[Any] = field(default_factory=Future)


class Outbox:
    """Entries, sent one after another by a thread of their own.

    One that fails because nobody answers (`is_outage`) is tried again, and those behind it wait, so that the order is kept. One
    that is refused is said and counted, and so are those that need its answer; the others go on.
    """

    def __init__(
        self,
        is_outage: Callable[[Exception], bool],
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.refused: list[str] = []
        """What the server did not take, each with the reason."""
        self._is_outage, self._say, self._clock = is_outage, say, clock
        self._sleep = sleep or self._rest
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._closed = self._away = False
        self._patience: float | None = None  # what is left of it; without end while the sweep runs
        self._drained_at = 0.0
        self._lost: list[str] = []  # when the patience was over, since something last arrived
        self._failures = 0
        self._dropped = 0
        threading.Thread(target=self._work, name="outbox", daemon=True).start()

    def post(self, what: str, call: Call[T]) -> Future[T]:
        """Have a call made when all before it have been; what it returned, or a TrackingError where it is not sent."""
        entry = _Entry(what, call)
        with self._changed:
            if self._closed:
                entry.answer.cancel()
            else:
                self._entries.append(entry)
                self._changed.notify_all()
        return entry.answer

    def drain(self, patience: float) -> int:
        """Wait until everything has arrived or was refused; returns how many entries did not, for nobody has answered.

        The patience counts only while nobody answers: a large file takes the time that it takes.
        """
        with self._changed:
            self._patience, self._drained_at = patience, self._clock()
            self._wake.set()
            away = self._away
        if away:
            self._say(f"MLflow does not answer: {self._waiting()}")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._entries)
            return len(self._lost) + self._dropped

    def close(self, within: float = 0.0) -> None:
        """Wait this long, and while the server answers, for what is on its way; drop the rest, and end the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._away or not self._entries, within)
            if not self._closed:
                self._closed, self._dropped = True, len(self._entries)
            for entry in self._entries:
                entry.answer.cancel()
            self._wake.set()
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (entry := self._next()) is not None:
                self._send(entry)
        finally:
            self.close()  # whatever ends the thread, nobody waits for it in vain

    def _next(self) -> _Entry | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._entries)
            return None if self._closed else self._entries[0]

    def _send(self, entry: _Entry) -> None:
        """Until it has arrived, was refused, or is given up."""
        entry.answer.set_running_or_notify_cancel()
        pause, again = FIRST_PAUSE, False
        while not self._closed:
            started = self._clock()
            try:
                answer = entry.call(again)
            except TrackingError as error:  # the answer that it needs will not come
                (self._lost if self._failures else self.refused).append(f"{entry.what}: {error}")
                return self._end(entry, error)
            except Exception as error:  # noqa: BLE001  # whatever a call raises is the end of its entry alone
                reason = redact((str(error).splitlines() or [repr(error)])[0])[:300]
                if not self._is_outage(error):
                    return self._refuse(entry, reason)
                self._miss(reason)
                if not self._wait(started, pause):
                    return self._lose(entry, reason)
                pause, again = min(2 * pause, LONGEST_PAUSE), True
            else:
                return self._arrive(entry, answer)
        return None

    def _wait(self, started: float, pause: float) -> bool:
        """Before the next try; False where the patience is over."""
        if self._patience is not None:
            left = self._patience - (self._clock() - max(started, self._drained_at))
            pause = min(pause, left)
            self._patience = left - pause
            if left <= 0:
                return False
        self._sleep(pause)
        return True

    def _rest(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()

    def _arrive(self, entry: _Entry, answer: Any) -> None:
        if self._away:
            self._away = False
            self._say(f"MLflow answers again; {num_entries(len(self._entries))} waited")
        self.refused += self._lost  # the server is there, so what was lost was more than it can bear
        self._lost, self._failures = [], 0
        entry.answer.set_result(answer)
        self._end(entry)

    def _refuse(self, entry: _Entry, reason: str) -> None:
        if len(self.refused) < SHOWN_REFUSALS:
            self._say(f"MLflow refused {entry.what}: {reason}")
        self.refused.append(f"{entry.what}: {reason}")
        self._end(entry, TrackingError(f"{entry.what} was refused"))

    def _lose(self, entry: _Entry, reason: str) -> None:
        self._lost.append(f"{entry.what}: {reason}")
        self._failures += 1
        self._end(entry, TrackingError(f"{entry.what} was not sent"))
        if self._failures == LAST_FAILURES:
            self.close()

    def _end(self, entry: _Entry, error: TrackingError | None = None) -> None:
        if error is not None:
            entry.answer.set_exception(error)
        with self._changed:
            self._entries.popleft()
            self._changed.notify_all()

    def _miss(self, reason: str) -> None:
        """Once an outage."""
        if self._away:
            return
        with self._changed:
            self._away = True
            self._changed.notify_all()
            kept = "what it is to be told is kept, and sent when it does" if self._patience is None else self._waiting()
        self._say(f"MLflow does not answer ({reason}): {kept}")

    def _waiting(self) -> str:
        waiting = len(self._entries)
        return f"{num_entries(waiting)} wait{'s' if waiting == 1 else ''}, up to {self._patience:.0f} s"


def num_entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"
