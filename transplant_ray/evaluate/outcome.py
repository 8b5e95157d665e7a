"""An outcome: what one variant did on one example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, TypeVar

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.decode import CLOSE_GAP
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import NAN_LOGITS, Completion, GenerationSettings, generate
from transplant_ray.evaluate.harness_judge import judge
from transplant_ray.evaluate.harness_process import HARNESS
from transplant_ray.evaluate.metrics import mean_interval, standard_error, wilson_interval
from transplant_ray.evaluate.read import Reading, read
from transplant_ray.evaluate.scorers import CHOICES, FORCED, LOSS, find_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

READS = (FORCED, LOSS)
"""Scorers that read references, and decode nothing."""
LATE = re.compile(r"no (answer|match) within \S+ s")
"""What judges say whose time ran out: `guarded.Unanswered`, `scorers.regex`."""


@dataclass(frozen=True, slots=True)  # of which a driver reads millions
class Outcome:
    variant: str
    example: str
    completion: str
    correct: bool
    num_tokens: int
    """New tokens, the end token included."""
    finished: bool
    """False where the limit cut the completion off."""
    num_close: int = 0
    """Steps at which rounding may decide, for the two best logits were closer than 1e-3."""
    parsed: bool = True
    """Whether the scorer could read an answer out of the completion; where it could not, the answer is wrong."""
    error: str | None = None
    """Why the answer could not be judged, which counts as wrong: a time limit, a crash."""
    loss: float | None = None
    """Nats a token of the reference, where that is what is scored; `correct` then says whether decoding would emit it."""

    @property
    def judged_late(self) -> bool:
        """Whether only the clock kept the answer from being judged: that says as much of the machine as of the answer."""
        return self.error is not None and LATE.fullmatch(self.error) is not None

    @property
    def score(self) -> float:
        """More is better: 1 for right and 0 for wrong, or minus the loss."""
        return float(self.correct) if self.loss is None else -self.loss


@dataclass(frozen=True)
class Tally:
    """Outcomes of one variant on one split, counted."""

    n: int
    correct: int
    seconds: float
    error: str | None = None
    parsed: int = 0
    """Completions that the scorer could read an answer out of."""
    cut_off: int = 0
    """Completions that the limit of new tokens ended."""

    losses: tuple[float, ...] = ()
    """Of the examples, where they are what is scored."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def loss(self) -> float | None:
        """Mean over the examples; None where answers are right or wrong."""
        return fmean(self.losses) if self.losses else None

    @property
    def score(self) -> float:
        """More is better: the accuracy, or minus the loss."""
        return -fmean(self.losses) if self.losses else self.accuracy

    @property
    def score_error(self) -> float:
        """Standard error of it; 0 for a single loss, of which nothing is known."""
        if not self.losses:
            return standard_error(self.accuracy, self.n)
        return stdev(self.losses) / sqrt(self.n) if self.n > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the accuracy or of the loss; None for a single loss."""
        if not self.losses:
            return wilson_interval(self.correct, self.n)
        ends = mean_interval(self.losses)
        return ends and (max(0.0, ends[0]), ends[1])  # no loss is less than 0

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], seconds: float) -> Tally:
        all_of = list(outcomes)
        right, parsed, finished = (sum(getattr(o, what) for o in all_of) for what in ("correct", "parsed", "finished"))
        losses = tuple(o.loss for o in all_of if o.loss is not None)
        return cls(len(all_of), right, seconds, parsed=parsed, cut_off=len(all_of) - finished, losses=losses)


def answer_examples(
    variant: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    settings: GenerationSettings,
    scorer: str,
) -> tuple[Outcome, ...]:
    """A model by itself, through plain `transformers`: generate, or read the references or choices, and score, in the order of
    `examples`.

    NumericsError where a logit is NaN.
    """
    if any(example.choices for example in examples):
        parts = [choice for example in examples for choice in example.choices]
        heard = (found(r) for _, r in read(model, tokenizer, parts, settings, lambda _: None, settings.batch_size, decodes=False))
        return tuple(choose(variant, example, [next(heard) for _ in example.choices], scorer) for example in examples)
    if scorer in READS:
        readings = read(model, tokenizer, examples, settings, lambda _: None, settings.batch_size, decodes=scorer == FORCED)
        return tuple(found(read_outcome(variant, examples[i], found(reading), tokenizer, scorer)) for i, reading in readings)
    completions = generate(model, tokenizer, [example.prompt_ids for example in examples], settings)
    return tuple(score(variant, e, c, scorer) for e, c in zip(examples, completions, strict=True))


def score(variant: str, example: Rendered, completion: Completion, scorer: str) -> Outcome:
    if scorer.startswith(HARNESS):
        grade = judge(scorer, example, [completion.text])
    else:
        grade = find_scorer(scorer)(completion.text, example.answer)
    told = (len(completion.token_ids), completion.finished, completion.num_close, grade.parsed is not None, grade.error)
    return Outcome(variant, example.id, completion.text, grade.correct, *told)


def read_outcome(
    variant: str, example: Rendered, reading: Reading, tokenizer: PreTrainedTokenizerBase, scorer: str
) -> Outcome | None:
    """What is known of a completion that was not decoded: it is the reference, or begins like this and goes another way.

    It counts as parsed, for tokens are compared and nothing has to be found among them. None where the loss is what is scored, and
    it is no number.
    """
    if scorer == LOSS and not isfinite(reading.loss):
        return None
    text = tokenizer.decode(reading.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    told = (reading.matches, len(reading.token_ids), reading.matches, reading.num_close)
    return Outcome(variant, example.id, text, *told, loss=reading.loss if scorer == LOSS else None)


def choose(variant: str, example: Rendered, readings: Sequence[Reading], scorer: str) -> Outcome:
    """The likeliest choice, the first of equal ones; `readings` are those of `example.choices`, in their order.

    It is close where the second best is: each is a sum of what rounding moves.
    """
    if scorer.startswith(HARNESS):
        return _judged(variant, example, readings, scorer)
    parts = list(zip(example.choices, readings, strict=True))
    lengths = [CHOICES[scorer](choice.answer, len(choice.answer_ids)) for choice in example.choices]
    scores = [-reading.loss * len(choice.answer_ids) / length for (choice, reading), length in zip(parts, lengths, strict=True)]
    best = scores.index(max(scores))
    close = sum(scores[best] - score < CLOSE_GAP for score in scores) > 1
    said = example.choices[best]
    return Outcome(variant, example.id, said.answer, said.answer == example.answer, len(said.answer_ids), True, int(close))


def _judged(variant: str, example: Rendered, readings: Sequence[Reading], scorer: str) -> Outcome:
    """A task of the harness makes of log-likelihoods what it likes; the likeliest is kept as the completion."""
    read = list(zip(example.choices, readings, strict=True))
    heard = [(-reading.loss * len(choice.answer_ids), reading.token_ids == choice.answer_ids) for choice, reading in read]
    grade = judge(scorer, example, heard)
    likelihoods = [likelihood for likelihood, _ in heard]
    best = likelihoods.index(max(likelihoods))
    close = readings[0].num_close if len(readings) == 1 else sum(max(likelihoods) - each < CLOSE_GAP for each in likelihoods) - 1
    said = example.choices[best]
    text = said.answer if len(readings) > 1 or heard[0][1] else ""
    return Outcome(variant, example.id, text, grade.correct, len(said.answer_ids), True, close, error=grade.error)


def found(value: T | None) -> T:
    """NumericsError in place of what NaN logits left."""
    if value is None:
        raise NumericsError(NAN_LOGITS)
    return value
