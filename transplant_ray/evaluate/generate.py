"""Greedy batched generation through `transformers`: left padding, and nothing of a model's own sampling settings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from transplant_ray.errors import NumericsError
from transplant_ray.models.rope import forget_longest, rope_boundary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TokenIds = Sequence[int]
NAN_LOGITS = "generation: NaN logits. The variant's numbers overflow in this dtype; try `resources.dtype: float32`."


@dataclass(frozen=True)
class GenerationSettings:
    max_new_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end a completion: the target's."""
    stop: tuple[str, ...] = ()
    batch_size: int = 64


@dataclass(frozen=True)
class Rules:
    """How the examples of a task are answered and judged."""

    generation: GenerationSettings
    scorer: str


@dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]
    """New tokens, the end token included where there is one."""
    text: str
    """Without special tokens, up to the first stop string."""
    finished: bool
    """False where the limit cut it off."""
    num_close: int = 0
    """Steps at which the two best logits were so close that the shape of a batch may decide between them; 0 where not counted."""


def end_ids(model_config_ids: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End tokens of a model: those of its generation config and its tokenizer's."""
    listed = [model_config_ids] if isinstance(model_config_ids, int) else list(model_config_ids or ())
    return tuple(dict.fromkeys(token for token in (*listed, tokenizer.eos_token_id) if token is not None))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    settings: GenerationSettings,
) -> list[Completion]:
    """Greedy completions, in the order of `prompts`. NumericsError where a logit is NaN.

    Batches hold prompts of similar length, so that little is padding; which ones follows from the prompts alone.
    """
    completions: dict[int, Completion] = {}
    lengths = [len(prompt) for prompt in prompts]
    boundary = rope_boundary(model.config)
    for batch in length_batches(lengths, settings.batch_size, settings.max_new_tokens, boundary):
        if boundary is not None:
            forget_longest(model)
        new_BT = _generate_batch(model, tokenizer, [prompts[i] for i in batch], settings)
        for index, row in zip(batch, new_BT.tolist(), strict=True):
            completions[index] = complete(row, tokenizer, settings)
    return [completions[index] for index in range(len(prompts))]


def length_batches(lengths: Sequence[int], size: int, limit: int = 0, boundary: int | None = None) -> Iterator[list[int]]:
    """Indices of prompts in batches of at most `size`, shortest first, ties in the given order.

    A prompt that reaches past `boundary` with `limit` new tokens is alone: a longer neighbour would change its numbers.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    together = [i for i in order if boundary is None or lengths[i] + limit <= boundary]
    yield from (together[start : start + size] for start in range(0, len(together), size))
    yield from ([i] for i in order[len(together) :])


def left_padded(rows: Sequence[TokenIds], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (batch, longest row), padding on the left."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _FiniteLogits(LogitsProcessor):
    """Remembers on the device whether any logit was NaN; greedy decoding would take one for a token."""

    def __init__(self, device: torch.device) -> None:
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        self.broken |= scores.isnan().any()
        return scores


class _StopStrings(StoppingCriteria):
    """Ends a row when its new text holds a stop string. The one of transformers lets a stop string begin in the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.stop, self.prompt_width = tokenizer, stop, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        if not self.stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        rows = input_ids[:, self.prompt_width :].tolist()
        return torch.tensor([holds_stop(row, self.tokenizer, self.stop) for row in rows], device=input_ids.device)


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    settings: GenerationSettings,
) -> torch.Tensor:
    """New tokens (batch, steps)."""
    ids_BP, mask_BP = left_padded(prompts, tokenizer.pad_token_id, model.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.end_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    guard = _FiniteLogits(model.device)
    own, model.generation_config = model.generation_config, config  # unset fields would be taken from the model's own
    try:
        out = model.generate(
            ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            logits_processor=LogitsProcessorList([guard]),
            stopping_criteria=StoppingCriteriaList([_StopStrings(tokenizer, settings.stop, ids_BP.shape[1])]),
        )
    finally:
        model.generation_config = own
    if guard.broken:
        raise NumericsError(NAN_LOGITS)
    new_BT: torch.Tensor = out[:, ids_BP.shape[1] :]
    return new_BT


def complete(row: list[int], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, num_close: int = 0) -> Completion:
    """A row is longer than its completion where others of its batch went on; what fills it up is not part of it."""
    length = _first_end(row, tokenizer, settings)
    tokens = row[:length]
    shown = tokens[:-1] if tokens[-1] in settings.end_ids else tokens
    text = tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [place for stop in settings.stop if (place := text.find(stop)) >= 0]
    return Completion(tuple(tokens), text[: min(cuts)] if cuts else text, length is not None, num_close)


def _first_end(row: list[int], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> int | None:
    """Number of tokens up to the first end token or the first stop string, whichever comes first; None where neither is there."""
    end = next((i + 1 for i, token in enumerate(row) if token in settings.end_ids), None)
    if not holds_stop(row[:end], tokenizer, settings.stop):
        return end
    return bisect_left(range(len(row)), True, key=lambda length: holds_stop(row[:length], tokenizer, settings.stop))


def holds_stop(tokens: list[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> bool:
    """Whether the text holds a stop string, which may be a special token."""
    if not stop:
        return False
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return any(string in text for string in stop)
