"""Reading references: what one teacher-forced pass says of an answer, with nothing decoded.

Shapes: N answer tokens of all examples of a pass, A of one of them, V vocabulary.

Greedy decoding emits exactly the reference if and only if every token of it, the end token included, is the best one after what
stands before it; one forward pass over prompt and answer tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.decode import CLOSE_GAP, Assign, pass_tokens
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.evaluate.teacher_forcing import lay_out, logits_at
from transplant_ray.models.rope import forget_longest, rope_boundary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS = 2**27
"""Numbers in the logits of one pass: half a gigabyte."""


@dataclass(frozen=True)
class Reading:
    loss: float
    """Mean over the reference's tokens, in nats; the end token is one of them."""
    token_ids: tuple[int, ...]
    """What greedy decoding begins with: up to the first token that is not the reference's, that one included."""
    matches: bool
    """Whether greedy decoding would emit exactly the reference. Any end token may end it."""
    num_close: int
    """Tokens up to there at which the two best logits were close."""


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    settings: GenerationSettings,
    assign: Assign,
    rows: int,
    *,
    decodes: bool = True,
) -> Iterator[tuple[int, Reading | None]]:
    """(index, reading) of every example, in the given order; None where a logit was NaN. At most `rows` in one pass.

    Past a RoPE boundary one pass does not tell what decoding would say: without `decodes`, what it says itself is taken.
    """
    boundary = rope_boundary(model.config)
    # No cache lies beside a pass, so it may be larger than one that fills a cache.
    for batch in _batches(examples, rows, 2 * pass_tokens(model), LOGITS // model.config.vocab_size, boundary):
        assign(batch)
        if boundary is not None:
            forget_longest(model)
        chosen = [examples[i] for i in batch]
        readings = list(_read_batch(model, chosen, settings))
        if decodes and _reaches(chosen[0], boundary):
            readings = [_decoded(model, tokenizer, chosen[0], settings, reading) for reading in readings]
        yield from zip(batch, readings, strict=True)


def _reaches(example: Rendered, boundary: int | None) -> bool:
    return boundary is not None and len(example.prompt_ids) + len(example.answer_ids) > boundary


def _decoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Rendered,
    settings: GenerationSettings,
    reading: Reading | None,
) -> Reading | None:
    """Past a RoPE boundary, decoding sees other frequencies from token to token, and one pass does not tell what it says."""
    try:
        (completion,) = generate(model, tokenizer, [example.prompt_ids], settings)
    except NumericsError:
        return None
    said = completion.token_ids
    return reading and _reading(example.answer_ids, said, [False] * len(said), reading.loss, settings)


def _batches(
    examples: Sequence[Rendered], rows: int, most_tokens: int, most_answer_tokens: int, boundary: int | None
) -> Iterator[list[int]]:
    """Consecutive examples, as many as a pass takes; one that reaches past a RoPE boundary is alone."""
    batch: list[int] = []
    width = answers = 0
    for index, example in enumerate(examples):
        answer = len(example.answer_ids)
        length = len(example.prompt_ids) + answer
        alone = _reaches(example, boundary)
        width, answers = max(width, length), answers + answer
        size = len(batch) + 1
        full = size > rows or size * width > most_tokens or answers > most_answer_tokens
        if batch and (full or alone):
            yield batch
            batch, width, answers = [], length, answer
        batch.append(index)
        if alone:
            yield batch
            batch, width, answers = [], 0, 0
    if batch:
        yield batch


def _read_batch(model: PreTrainedModel, examples: Sequence[Rendered], settings: GenerationSettings) -> Iterator[Reading | None]:
    answers = [example.answer_ids for example in examples]
    ids_BS, place_N = lay_out([example.prompt_ids for example in examples], answers, model.device)
    logits_NV = logits_at(model, ids_BS, place_N)
    reference_N = torch.tensor([token for answer in answers for token in answer], device=logits_NV.device)
    loss_N = cross_entropy(logits_NV, reference_N, reduction="none")
    best_N2, token_N2 = logits_NV.topk(2)
    close_N = best_N2[:, 0] - best_N2[:, 1] < CLOSE_GAP
    parts = [iter(part.tolist()) for part in (loss_N, token_N2[:, 0], close_N, best_N2[:, 0].isnan())]
    for answer in answers:
        loss_A, tokens_A, close_A, broken_A = (list(islice(part, len(answer))) for part in parts)
        yield None if any(broken_A) else _reading(answer, tokens_A, close_A, sum(loss_A) / len(answer), settings)


def _reading(
    reference: Sequence[int], greedy: Sequence[int], close: Sequence[bool], loss: float, settings: GenerationSettings
) -> Reading:
    pairs = enumerate(zip(greedy, reference, strict=False), start=1)
    length = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(greedy), len(reference)))
    said = tuple(greedy[:length])
    return Reading(loss, said, _matches(said, tuple(reference), settings), sum(close[:length]))


def _matches(said: tuple[int, ...], reference: tuple[int, ...], settings: GenerationSettings) -> bool:
    """Whether decoding says the reference and ends there: with an end token, whichever it is, or at the limit."""
    ends = set(settings.end_ids)
    if len(said) != len(reference) or said[:-1] != reference[:-1] or ends & set(reference[:-1]):
        return False
    if {said[-1], reference[-1]} <= ends:
        return len(said) <= settings.max_new_tokens
    return said == reference and len(said) == settings.max_new_tokens
