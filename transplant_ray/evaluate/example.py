"""An example of a task, as text and as token ids. What computes with examples needs this file and no reader of data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from transplant_ray.errors import DataError

Split = Literal["probe", "select", "test"]


@dataclass(frozen=True)
class Example:
    id: str
    """Content hash of prompt and answer."""
    prompt: str
    answer: str

    @classmethod
    def of(cls, prompt: str, answer: str) -> Example:
        text = json.dumps([prompt, answer], ensure_ascii=False)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], prompt, answer)


@dataclass(frozen=True)
class Rendered:
    """An example as token ids, by the target's tokenizer."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The reference answer with its end token."""
    answer: str


def encode_example(example: Example, encode: Callable[[str], list[int]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Token ids of an example; `encode` is how a prompt becomes token ids. DataError where the prompt has none."""
    prompt = encode(example.prompt)
    if not prompt:
        raise DataError(f"example {example.id}: the prompt is empty after tokenization.")
    answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Rendered(example.id, tuple(prompt), tuple(answer + end), example.answer)


def check_lengths(examples: Sequence[Rendered], max_new_tokens: int, positions: int | None) -> None:
    """DataError where a prompt and its completion do not fit into the model's positions."""
    longest = max(examples, key=lambda example: len(example.prompt_ids))
    if positions is not None and len(longest.prompt_ids) + max_new_tokens > positions:
        raise DataError(
            f"example {longest.id}: {len(longest.prompt_ids)} prompt tokens + {max_new_tokens} new ones exceed the model's "
            f"{positions} positions. Lower `task.max_new_tokens` or drop long prompts."
        )


def check_answers(examples: Sequence[Rendered], max_new_tokens: int, ends: Collection[int]) -> None:
    """DataError where greedy decoding could never emit a reference: without an end token, or longer than the limit."""
    for example in examples:
        if example.answer_ids[-1] not in ends:
            raise DataError(
                "`scorer: forced`: the target's tokenizer has no end token, so no answer ever ends. Use another scorer."
            )
    longest = max(examples, key=lambda example: len(example.answer_ids))
    if (length := len(longest.answer_ids)) > max_new_tokens:
        raise DataError(
            f"`scorer: forced`: the answer of example {longest.id} has {length} tokens with its end, and `task.max_new_tokens` is "
            f"{max_new_tokens}, so it could never be right. Use task.max_new_tokens={length}."
        )
