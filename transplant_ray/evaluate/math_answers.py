"""Equal as mathematics, by the math-verify library, in a process of its own: hostile LaTeX can hang sympy, fill the memory or
overflow the stack."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import NamedTuple

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.guarded import CannotStart, Unanswered, Worker, serve

TIME_LIMIT = 5.0
"""Seconds for one answer. Gold answers of MATH-500 take 2 ms in the middle and 0.3 s at most."""

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


class MathWorker(Worker):
    """The process that compares."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(__name__, time_limit, "math-verify")

    def compare(self, text: str, reference: str) -> Comparison:
        self.check()
        try:
            return Comparison(*self.ask((text, reference)))
        except Unanswered as error:
            return Comparison(False, None, str(error))

    def check(self) -> None:
        """RecipeError where answers cannot be compared here."""
        if find_spec("math_verify") is None:
            raise _refusal("the library math-verify is not installed")
        try:
            self.start()
        except CannotStart as error:
            raise _refusal(str(error)) from error


def check() -> None:
    """RecipeError where math-verify cannot be imported."""
    _worker().check()


def _refusal(trouble: str) -> RecipeError:
    return RecipeError(f"`scorer: math`: {trouble}. Install it with {INSTALL}, or use `scorer: strict_boxed`.")


@cache
def _worker() -> MathWorker:
    worker = MathWorker()
    atexit.register(worker.close)
    return worker


def _comparer() -> Callable[[tuple[str, str]], tuple[bool, str | None, str | None]]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def answer(text: str, reference: str) -> Comparison:
        # Its own time limits are signals, which only stop Python code; ours is the end of the process.
        said = parse(text, extraction, parsing_timeout=None)
        if not said:
            return Comparison(False, None)
        gold = parse(f"\\boxed{{{reference}}}", extraction, parsing_timeout=None)
        return Comparison(bool(verify(gold, said, timeout_seconds=None)), str(said[-1]))

    def guarded(question: tuple[str, str]) -> tuple[bool, str | None, str | None]:
        try:
            found = answer(*question)
            return found.correct, found.parsed, found.error
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            return False, None, type(error).__name__

    return guarded


if __name__ == "__main__":
    serve(_comparer)
