"""A process of its own for what may hang, fill the memory or crash: judging what a model has written.

It is started on first use and reused, killed where an answer takes too long, and started again for the next one. No signal is
needed on this side: an actor may ask from any thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

START_LIMIT = 120.0
"""Seconds in which the process must be ready: importing takes one or two, on a busy machine many."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes that the process may address."""


class Unanswered(Exception):
    """The process gave no answer: it took too long, or died."""


class CannotStart(Exception):
    """The process cannot do its work at all; the message says why."""


class Worker:
    """A process that runs `module`, which calls `serve`. One question at a time; threads wait for each other."""

    def __init__(self, module: str, time_limit: float, name: str, start_limit: float = START_LIMIT) -> None:
        """`name` is what crashes, in messages."""
        self.module, self.name = module, name
        self.time_limit, self.start_limit = time_limit, start_limit
        self.process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._lock = threading.Lock()

    def ask(self, question: Any, time_limit: float | None = None) -> Any:
        """The answer. Unanswered where none comes in time, CannotStart where no process can give any."""
        limit = time_limit or self.time_limit
        with self._lock:
            line, answered = self._connect(), False
            try:
                line.send((question, limit))
                if not line.poll(limit):
                    raise Unanswered(f"no answer within {limit:g} s")
                answer = line.recv()
                answered = True
            except (EOFError, OSError) as error:
                raise Unanswered(f"{self.name} crashed") from error
            finally:
                if not answered:  # also where we are interrupted: a late answer must not be taken for the next one
                    self._stop()
            return answer

    def start(self) -> None:
        """CannotStart where it cannot be done; otherwise the process is ready."""
        with self._lock:
            self._connect()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _connect(self) -> Connection:
        if self._line is not None and self.process is not None and self.process.poll() is None:
            return self._line
        self._stop()
        if sys.platform == "win32":
            raise CannotStart("it needs a process with a pipe of its own, which this system does not give")
        self._line, trouble = self._start(), "it did not start"
        try:
            if self._line.poll(self.start_limit):
                trouble = self._line.recv()
        except EOFError:
            trouble = "its process ended at the start"
        finally:
            if trouble:
                self._stop()
        if trouble:
            raise CannotStart(trouble)
        return self._line

    def _start(self) -> Connection:
        """A fresh interpreter: no fork (there are threads), and not multiprocessing's spawn, which runs the user's script again."""
        ours, theirs = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},  # sympy's order of terms must repeat
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return ours

    def _stop(self) -> None:
        if self._line is not None:
            self._line.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self._line = None


def serve(begin: Callable[[], Callable[[Any], Any]], memory_limit: int | None = MEMORY_LIMIT) -> None:
    """The process's side: say what is missing, "" for nothing, then answer until the other side is gone."""
    if memory_limit is not None:
        _limit_memory(memory_limit)
    with Connection(int(sys.argv[1])) as line:
        try:
            answer = begin()
        except ImportError as error:
            line.send(str(error))
            return
        line.send("")
        with suppress(EOFError):
            while True:
                question, limit = line.recv()
                signal.alarm(int(limit) + 5)  # ends this process where nobody is left to kill it
                line.send(answer(question))
                signal.alarm(0)


def _limit_memory(most: int) -> None:
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_AS, (most, most))
