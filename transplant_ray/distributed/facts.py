"""What happens in a run, each kind of it a small record: what the log, the terminal and Ray's metrics are told.

The name of a class is the name of the event in the log: `ShardDone` is `shard done`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from transplant_ray.evaluate.answers import VariantShard, shard_name
from transplant_ray.evaluate.example import Split


@dataclass(frozen=True)
class Fact:
    level: ClassVar[int] = logging.INFO

    @classmethod
    def event(cls) -> str:
        return re.sub(r"(?<=.)([A-Z])", r" \1", cls.__name__).lower()


@dataclass(frozen=True)
class SweepBegins(Fact):
    verb: str
    results: str
    """Where they are written, as it may be shown."""


@dataclass(frozen=True)
class SweepEnds(Fact):
    exit: int
    """The exit code of the command line: 130 of Ctrl-C, 143 of SIGTERM."""
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class StageBegins(Fact):
    stage: str
    total: int
    unit: str


@dataclass(frozen=True)
class StageEnds(Fact):
    stage: str
    seconds: float


@dataclass(frozen=True)
class Paced(Fact):
    """How fast the stage goes that is going on, every few seconds."""

    level: ClassVar[int] = logging.DEBUG

    tokens_per_second: float | None
    """Over the last minute; None where none came."""
    seconds_left: float | None
    """At the pace of the stage so far; None where that is not known."""


@dataclass(frozen=True)
class Note(Fact):
    """What a user was told to read."""

    level: ClassVar[int] = logging.WARNING

    text: str


@dataclass(frozen=True)
class VariantsPlanned(Fact):
    labels: Mapping[str, str]
    """Variant id → what a plan calls it first."""


@dataclass(frozen=True)
class VariantsAsked(Fact):
    """The variants that are going to answer all of select, the task and its guards."""

    variants: int


@dataclass(frozen=True)
class ShardDone(Fact):
    """One variant has answered one shard of examples."""

    task: str
    split: Split
    variant: str
    shard: str | None
    """Its first example and how many they are: `EXAMPLE+15`, the same in every attempt; None where it failed."""
    examples: int
    tokens: int
    """Generated, or read where nothing is decoded."""
    seconds: float
    evaluator: str
    node: str
    error: str | None = None


@dataclass(frozen=True)
class ShardRecalled(ShardDone):
    """The ledger knew it; `seconds` are those that it once took."""

    level: ClassVar[int] = logging.DEBUG


def of_shard(task: str, split: Split, shard: VariantShard) -> ShardDone:
    said = shard.outcomes
    return (ShardRecalled if shard.recalled else ShardDone)(
        task=task,
        split=split,
        variant=shard.variant,
        shard=shard_name([outcome.example for outcome in said]) if said else shard.asked or None,
        examples=len(said),
        tokens=sum(outcome.num_tokens for outcome in said),
        seconds=round(shard.seconds, 4),
        evaluator=shard.evaluator,
        node=shard.node,
        error=shard.error,
    )


@dataclass(frozen=True)
class VariantDone(Fact):
    """It has answered all that it was asked on select, or was stopped before."""

    variant: str
    stopped: str | None = None


@dataclass(frozen=True)
class VariantRecalled(Fact):
    """Of this split the ledger knew all that a model of an organ sweep is asked."""

    level: ClassVar[int] = logging.DEBUG

    variant: str
    split: Split


@dataclass(frozen=True)
class VariantFailed(Fact):
    level: ClassVar[int] = logging.WARNING

    variant: str
    error: str


@dataclass(frozen=True)
class TrialReported(Fact):
    trial: str
    variant: str
    examples: int
    score: float | None
    stopped: str | None
    error: str | None


@dataclass(frozen=True)
class Winner(Fact):
    trial: str
    variant: str
    score: float | None


@dataclass(frozen=True)
class Exported(Fact):
    variant: str
    checkpoint: str


@dataclass(frozen=True)
class StepsDone(Fact):
    """An organ, or what a lesson trains, has been trained for some more steps."""

    step: int
    tokens: int
    """Since the last such fact."""
    loss: float | None
    """Nats a token, mean over these steps."""
    held_out: float | None
    """Loss on text that is not trained on, where it was measured."""
    lesson: str = ""
    """Of a comparison, which."""


@dataclass(frozen=True)
class LessonFact(Fact):
    lesson: str
    """Its folder below `lessons`: the same in every attempt."""
    model: str
    method: str
    stage: str
    lr: float | None
    seed: int | None


@dataclass(frozen=True)
class LessonBegins(LessonFact):
    """Somebody has it in hand; again after a death."""


@dataclass(frozen=True)
class LessonDone(LessonFact):
    seconds: float
    """Of training."""
    loss: float | None
    """On select of the domain text, in nats a token."""


@dataclass(frozen=True)
class LessonFailed(LessonFact):
    level: ClassVar[int] = logging.WARNING

    error: str


@dataclass(frozen=True)
class EvaluatorJoined(Fact):
    evaluator: str


@dataclass(frozen=True)
class EvaluatorRestarted(EvaluatorJoined):
    """It had died."""


@dataclass(frozen=True)
class EvaluatorDied(Fact):
    level: ClassVar[int] = logging.WARNING

    evaluator: str
    variants: tuple[str, ...]
    """That it had in hand and had not answered."""


@dataclass(frozen=True)
class AtWork(Fact):
    """How many evaluators have work in hand, of how many that are there."""

    level: ClassVar[int] = logging.DEBUG

    evaluators: int
    of: int
    gpus: float
    """That those at work hold."""
