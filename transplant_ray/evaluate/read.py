"""Reading references: what one teacher-forced pass says of an answer, with nothing decoded.

Shapes: B rows, A answer tokens of the longest answer, V vocabulary.

Greedy decoding emits exactly the reference if and only if every token of it, the end token included, is the best one after what
stands before it; one forward pass over prompt and answer tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.decode import CLOSE_GAP, Assign, last_logits, pass_tokens
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, generate, left_padded
from transplant_ray.models.rope import forget_longest, rope_boundary

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
) -> Iterator[tuple[int, Reading | None]]:
    """(index, reading) of every example, in the given order; None where a logit was NaN. At most `rows` in one pass."""
    boundary = rope_boundary(model.config)
    for batch in _batches(examples, rows, pass_tokens(model), LOGITS // model.config.vocab_size, boundary):
        assign(batch)
        if boundary is not None:
            forget_longest(model)
        chosen = [examples[i] for i in batch]
        readings = list(_read_batch(model, tokenizer, chosen, settings))
        if _reaches(chosen[0], boundary):
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
    width = answer = 0
    for index, example in enumerate(examples):
        length = len(example.prompt_ids) + len(example.answer_ids)
        alone = _reaches(example, boundary)
        width, answer = max(width, length), max(answer, len(example.answer_ids))
        size = len(batch) + 1
        full = size > rows or size * width > most_tokens or size * answer > most_answer_tokens
        if batch and (full or alone):
            yield batch
            batch, width, answer = [], length, len(example.answer_ids)
        batch.append(index)
        if alone:
            yield batch
            batch, width, answer = [], 0, 0
    if batch:
        yield batch


def _read_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Rendered], settings: GenerationSettings
) -> Iterator[Reading | None]:
    ids_BS, mask_BS = left_padded([[*e.prompt_ids, *e.answer_ids[:-1]] for e in examples], tokenizer.pad_token_id, model.device)
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    longest = max(len(e.answer_ids) for e in examples)
    logits_BAV = last_logits(model, longest, input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False)
    reference_BA, mask_BA = left_padded([e.answer_ids for e in examples], 0, model.device)
    loss_BA = cross_entropy(logits_BAV.transpose(1, 2), reference_BA, reduction="none") * mask_BA
    best_BA2, token_BA2 = logits_BAV.topk(2)
    close_BA = (best_BA2[..., 0] - best_BA2[..., 1] < CLOSE_GAP).tolist()
    broken_B = (best_BA2[..., 0].isnan() & mask_BA.bool()).any(-1).tolist()
    losses, tokens_BA = (loss_BA.sum(-1) / mask_BA.sum(-1)).tolist(), token_BA2[..., 0].tolist()
    for example, loss, tokens, close, broken in zip(examples, losses, tokens_BA, close_BA, broken_B, strict=True):
        size = len(example.answer_ids)
        yield None if broken else _reading(example.answer_ids, tokens[-size:], close[-size:], loss, settings)


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
