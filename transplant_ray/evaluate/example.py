"""An example of a task, as text and as token ids. What computes with examples needs this file and no reader of data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transplant_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["probe", "select", "test"]


@dataclass(frozen=True)
class Example:
    id: str
    """Content hash of prompt, answer and choices."""
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    """What is chosen from, the answer among them; empty where an answer is written freely."""

    @property
    def asked(self) -> str:
        """What no other example may ask: the prompt, or where there is none, the text itself."""
        return self.prompt or self.answer

    @classmethod
    def of(cls, prompt: str, answer: str, choices: tuple[str, ...] = ()) -> Example:
        text = json.dumps([prompt, answer, *choices], ensure_ascii=False)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], prompt, answer, choices)


@dataclass(frozen=True)
class Rendered:
    """An example as token ids, by the target's tokenizer."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The reference answer with its end token; a right choice has none."""
    answer: str
    choices: tuple[Rendered, ...] = ()
    """Prompt and choice, for each choice: `answer_ids` are the tokens whose likelihood counts."""
    doc: Mapping[str, Any] | None = field(default=None, compare=False)
    """The row, for a scorer that wants all of it."""


def encode_example(
    example: Example, encode: Callable[[str], list[int]], tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False
) -> Rendered:
    """Token ids of an example; `encode` is how a prompt becomes token ids. DataError where the prompt has none.

    Of `plain_text` without a prompt, and without a token that begins every text, the first token is the prompt.
    """
    if example.choices:
        return _encode_choices(example, encode)
    prompt = encode(example.prompt)
    answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    if not prompt and plain_text:
        prompt, answer = answer[:1], answer[1:]
    if not prompt:
        raise DataError(f"example {example.id}: the prompt is empty after tokenization.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if plain_text and not [*answer, *end]:
        raise DataError(f"example {example.id}: the text has one token, and none is left to predict. Remove it.")
    return Rendered(example.id, tuple(prompt), tuple(answer + end), example.answer)


def _encode_choices(example: Example, encode: Callable[[str], list[int]]) -> Rendered:
    """Every choice as it is written after the prompt. DataError where one, or the prompt, has no token of its own."""
    choices = []
    for place, text in enumerate(example.choices):
        prompt, choice = encode_pair(encode, example.prompt, text)
        if not prompt or not choice:
            raise DataError(
                f"example {example.id}: the {'choice ' + repr(text) if prompt else 'prompt'} is empty after tokenization."
            )
        choices.append(Rendered(f"{example.id}/{place}", tuple(prompt), tuple(choice), text))
    right = choices[example.choices.index(example.answer)]
    return Rendered(example.id, right.prompt_ids, right.answer_ids, example.answer, tuple(choices))


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a text and of what follows it, cut where the text ends in tokens.

    White space at the seam belongs to what follows, where tokenizers put it: as lm-evaluation-harness does.
    """
    start = context.rstrip()
    head = encode(start)
    return head, encode(start + context[len(start) :] + continuation)[len(head) :]


def longest_answer(examples: Sequence[Rendered]) -> int:
    """Tokens of the longest reference: the limit of a task that reads it."""
    return max(len(example.answer_ids) for example in examples)


def longest_choice(examples: Sequence[Rendered]) -> int:
    """Tokens of the longest choice: the limit of a task that decodes nothing."""
    return max(len(choice.answer_ids) for example in examples for choice in example.choices)


def check_lengths(examples: Sequence[Rendered], max_new_tokens: int, positions: int | None) -> None:
    """DataError where a prompt and its completion do not fit into the model's positions."""
    longest = max(examples, key=lambda example: len(example.prompt_ids))
    if positions is not None and len(longest.prompt_ids) + max_new_tokens > positions:
        raise DataError(
            f"example {longest.id}: {len(longest.prompt_ids)} prompt tokens + {max_new_tokens} new ones exceed the model's "
            f"{positions} positions. Lower `task.max_new_tokens` or drop long prompts."
        )


def check_references(examples: Sequence[Rendered], positions: int | None) -> None:
    """DataError where a prompt and its reference, or one of its choices, do not fit into the model's positions."""
    for part in (part for example in examples for part in example.choices or (example,)):
        length = len(part.prompt_ids) + len(part.answer_ids)
        if positions is not None and length > positions:
            raise DataError(
                f"example {part.id}: the prompt and what is read after it have {length} tokens, which exceed the model's "
                f"{positions} positions. Drop long rows, or cut them."
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
