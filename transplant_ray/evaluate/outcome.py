"""An outcome: what one variant did on one example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.evaluate.scorers import SCORERS
from transplant_ray.evaluate.task import Rendered


@dataclass(frozen=True)
class Outcome:
    variant: str
    example: str
    completion: str
    correct: bool
    num_tokens: int
    """New tokens, the end token included."""
    finished: bool
    """False where the limit cut the completion off."""


SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("example", pa.string()),
        ("completion", pa.string()),
        ("correct", pa.bool_()),
        ("num_tokens", pa.int32()),
        ("finished", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Tally:
    """Outcomes of one variant on one split, counted."""

    n: int
    correct: int
    seconds: float
    error: str | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], seconds: float) -> Tally:
        right = [outcome.correct for outcome in outcomes]
        return cls(len(right), sum(right), seconds)


def answer_examples(
    variant: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    settings: GenerationSettings,
    scorer: str,
) -> tuple[Outcome, ...]:
    """Generate and score, in the order of `examples`."""
    completions = generate(model, tokenizer, [example.prompt_ids for example in examples], settings)
    score = SCORERS[scorer]
    return tuple(
        Outcome(variant, e.id, c.text, score(c.text, e.answer), len(c.token_ids), c.finished)
        for e, c in zip(examples, completions, strict=True)
    )
