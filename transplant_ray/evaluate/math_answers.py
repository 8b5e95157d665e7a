"""Equal as mathematics, by the math-verify library, in a process of its own.

Hostile LaTeX can hang sympy, fill the memory or overflow the stack. So the comparing is done by a process that nothing else depends
on: it is started on first use and reused, killed where an answer takes too long, and started again for the next one. No signal is
needed on this side: an actor may ask from any thread.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

from transplant_ray.errors import RecipeError

TIME_LIMIT = 5.0
"""Seconds for one answer. Gold answers of MATH-500 take 2 ms in the middle and 0.3 s at most."""

START_LIMIT = 120.0
"""Seconds in which the process must have imported sympy: it takes one, on a busy machine many."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes that the process may address."""

INSTALL = "pip install 'math-verify[antlr4_13_2]>=0.9,<1'"


class Comparison(NamedTuple):
    correct: bool
    parsed: str | None
    """What math-verify read out of the text; None where it found no mathematics."""
    error: str | None = None
    """Why there was no answer: the time limit, or a crash."""


@lru_cache(maxsize=4096)  # variants often say the same, and what hangs should hang once
def compare(text: str, reference: str) -> Comparison:
    """Whether the answer in `text`, boxed or not, equals the reference (LaTeX, no box) as mathematics.

    A time-out or a crash is a wrong answer with its `error`. RecipeError where math-verify cannot be imported.
    """
    return _worker().compare(text, reference)


class MathWorker:
    """The process. One answer at a time; threads wait for each other."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        self.process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._lock = threading.Lock()

    def compare(self, text: str, reference: str) -> Comparison:
        with self._lock:
            line = self._connect()
            answer: Comparison | None = None
            error = f"no answer within {self.time_limit:g} s"
            try:
                line.send((text, reference))
                if line.poll(self.time_limit):
                    answer = Comparison(*line.recv())
            except (EOFError, OSError):
                error = "math-verify crashed"
            finally:
                if answer is None:  # also where we are interrupted: a late answer must not be taken for the next one
                    self._stop()
            return answer or Comparison(False, None, error)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _connect(self) -> Connection:
        if self._line is not None and self.process is not None and self.process.poll() is None:
            return self._line
        self._stop()
        if find_spec("math_verify") is None:
            raise _refusal("the library math-verify is not installed")
        self._line, trouble = self._start(), "it did not start"
        try:
            if self._line.poll(START_LIMIT):
                trouble = self._line.recv()
        except EOFError:
            trouble = "its process ended at the start"
        finally:
            if trouble:
                self._stop()
        if trouble:
            raise _refusal(trouble)
        return self._line

    def _start(self) -> Connection:
        """A fresh interpreter: no fork (there are threads), and not multiprocessing's spawn, which runs the user's script again."""
        ours, theirs = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self.time_limit)],
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


def _refusal(trouble: str) -> RecipeError:
    return RecipeError(f"`scorer: math`: {trouble}. Install it with {INSTALL}, or use `scorer: strict_boxed`.")


@cache
def _worker() -> MathWorker:
    worker = MathWorker()
    atexit.register(worker.close)
    return worker


def _serve(connection: Connection, time_limit: float) -> None:
    """The process's side: say what is missing, "" for nothing, then answer until the other side is gone."""
    try:
        answer = _comparer()
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send("")
    with suppress(EOFError):
        while True:
            text, reference = connection.recv()
            signal.alarm(int(time_limit) + 5)  # ends this process where nobody is left to kill it
            connection.send(tuple(answer(text, reference)))
            signal.alarm(0)


def _comparer() -> Callable[[str, str], Comparison]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def answer(text: str, reference: str) -> Comparison:
        # Its own time limits are signals, which only stop Python code; ours is the end of the process.
        said = parse(text, extraction, parsing_timeout=None)
        if not said:
            return Comparison(False, None)
        gold = parse(f"\\boxed{{{reference}}}", extraction, parsing_timeout=None)
        return Comparison(bool(verify(gold, said, timeout_seconds=None)), str(said[-1]))

    def guarded(text: str, reference: str) -> Comparison:
        try:
            return answer(text, reference)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            return Comparison(False, None, type(error).__name__)

    return guarded


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with Connection(int(sys.argv[1])) as inherited:
        _serve(inherited, float(sys.argv[2]))
