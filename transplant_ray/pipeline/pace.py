"""How far a stage is and how fast it goes, in one line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from transplant_ray.distributed.facts import (
    AtWork,
    Fact,
    ShardDone,
    ShardRecalled,
    StageEnds,
    StepsDone,
    VariantDone,
    VariantRecalled,
    VariantsAsked,
)

MODELS = "models"
"""Unit of the stages of an organ sweep, whose progress is no number of examples."""
WINDOW_SECONDS = 60
"""Tokens a second are those of the last minute."""


class Pace:
    """A stage that is going on; what was recalled from the ledger is progress and no pace."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.asked, self.variants_done = 0, 0
        self.at_work = AtWork(0, 0, 0.0)
        self.begin("", 0, "")

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.recalled = 0, 0
        self.began = self.clock()
        self.tokens: deque[tuple[float, int]] = deque()
        self.loss: float | None = None

    def advance(self, amount: int) -> None:
        self.done += amount

    def hear(self, fact: Fact) -> None:
        match fact:
            case ShardRecalled():
                self.recalled += fact.examples if self.unit != MODELS else 0
            case VariantRecalled():
                self.recalled += self.unit == MODELS
            case ShardDone() if fact.evaluator:  # a model that answers by itself tells all of it at once
                self._count(fact.tokens)
            case StepsDone():
                self._count(fact.tokens)
                self.loss = self.loss if fact.loss is None else fact.loss
            case VariantsAsked():
                self.asked, self.variants_done = fact.variants, 0
            case VariantDone():
                self.variants_done += 1
            case AtWork():
                self.at_work = fact
            case StageEnds():  # what comes before the next, such as loading models, may take long too
                self.begin(f"after {fact.stage}", 0, "")

    def _count(self, tokens: int) -> None:
        self.tokens.append((self.clock(), tokens))
        while self.clock() - self.tokens[0][0] > WINDOW_SECONDS:
            self.tokens.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """None where there was no answer lately."""
        now = self.clock()
        recent = [number for when, number in list(self.tokens) if now - when <= WINDOW_SECONDS]  # a copy: others append meanwhile
        elapsed = min(now - self.began, WINDOW_SECONDS)
        return sum(recent) / elapsed if recent and elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the stage so far; None where that is not known."""
        computed, elapsed = self.done - self.recalled, self.clock() - self.began
        if not self.total or computed <= 0 or elapsed <= 0:
            return None
        return max(0, self.total - self.done) * elapsed / computed

    def facts(self) -> str:
        """Everything but the count of the stage itself; under 80 columns."""
        speed, left = self.tokens_per_second, self.seconds_left
        parts = [
            f"{self.variants_done:,}/{self.asked:,} variants" if self.variants_done < self.asked else "",
            "" if self.loss is None else f"loss {self.loss:.3f}",
            "" if speed is None else f"{speed:,.0f} tokens/s",
            self._workers(),
            "" if left is None else f"{shown_seconds(left)} left",
        ]
        return ", ".join(part for part in parts if part)

    def line(self) -> str:
        count = f"{self.done:,} of {self.total:,} {self.unit}" if self.total else f"for {shown_seconds(self.clock() - self.began)}"
        facts = self.facts()
        return f"{self.stage}: {count}{', ' if facts else ''}{facts}"

    def _workers(self) -> str:
        busy, gpus = self.at_work.evaluators, self.at_work.gpus
        if not busy:
            return ""
        return f"{busy} evaluator{'s' if busy > 1 else ''}" + (f", {gpus:g} GPU{'s' if gpus > 1 else ''}" if gpus else "")


def shown_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"
