"""Judging as a task of lm-evaluation-harness does, in a process of its own (`harness_process`) with a time limit."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.guarded import START_LIMIT, CannotStart, Unanswered, Worker
from transplant_ray.evaluate.harness_process import Heard
from transplant_ray.evaluate.scorers import Grade

TIME_LIMIT = 10.0
"""Seconds for one answer: some tasks compare mathematics."""

INSTALL = "pip install 'transplant-ray[lm_eval]'"


def judge(scorer: str, example: Rendered, heard: Sequence[Heard]) -> Grade:
    """Right where the metric is 1, wrong where it is 0. A crash, a time-out or another value is a wrong answer with its error.

    RecipeError where the process cannot work at all.
    """
    return _remembered(_Question(scorer, example.id, tuple(heard), _Row(example.doc or {})))


@dataclass(frozen=True)
class _Row:
    """It comes along; the id of its example says which it is."""

    doc: Mapping[str, Any]

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row)


@dataclass(frozen=True)
class _Question:
    scorer: str
    example: str
    heard: tuple[Heard, ...]
    row: _Row


@lru_cache(maxsize=65536)  # variants often say the same
def _remembered(question: _Question) -> Grade:
    return _worker().judge(question.scorer, question.row.doc, question.heard)


class JudgeWorker(Worker):
    """The process. One answer at a time; threads wait for each other."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        super().__init__("transplant_ray.evaluate.harness_process", time_limit, "the task's scorer")
        self._told: set[tuple[int, str]] = set()

    def judge(self, scorer: str, doc: Mapping[str, Any], heard: Sequence[Heard]) -> Grade:
        try:
            self._tell(scorer, doc)
            return Grade(*self.ask((scorer, dict(doc), list(heard))))
        except Unanswered as error:
            return Grade(False, None, str(error))
        except CannotStart as error:
            raise RecipeError(f"`task.lm_eval`: {error}. Install it with {INSTALL}.") from error

    def _tell(self, scorer: str, doc: Mapping[str, Any]) -> None:
        """A task is read before its first answer, which takes longer than judging one."""
        self.start()
        key = (self.process.pid if self.process else 0, scorer)
        if key in self._told:
            return
        *_, trouble = self.ask((scorer, dict(doc), None), START_LIMIT)
        if trouble:
            raise RecipeError(f"`task.lm_eval`: the task cannot be read where answers are judged ({trouble}).")
        self._told.add(key)


@cache
def _worker() -> JudgeWorker:
    worker = JudgeWorker()
    atexit.register(worker.close)
    return worker
