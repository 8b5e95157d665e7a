"""Greedy batched generation through `transformers`: left padding, and nothing of a model's own sampling settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transplant_ray.errors import NumericsError

TokenIds = Sequence[int]


@dataclass(frozen=True)
class GenerationSettings:
    max_new_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end a completion: the target's."""
    stop: tuple[str, ...] = ()
    batch_size: int = 64


@dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]
    """New tokens, the end token included where there is one."""
    text: str
    """Without special tokens, up to the first stop string."""
    finished: bool
    """False where the limit cut it off."""


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
    for batch in length_batches(prompts, settings.batch_size):
        new_BT = _generate_batch(model, tokenizer, [prompts[i] for i in batch], settings)
        for index, row in zip(batch, new_BT.tolist(), strict=True):
            completions[index] = _completion(row, tokenizer, settings)
    return [completions[index] for index in range(len(prompts))]


def length_batches(prompts: Sequence[TokenIds], size: int) -> Iterator[list[int]]:
    """Indices of `prompts` in batches of at most `size`, shortest first, ties in the given order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


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
        stop_strings=list(settings.stop) or None,
    )
    guard = _FiniteLogits(model.device)
    own, model.generation_config = model.generation_config, config  # unset fields would be taken from the model's own
    try:
        out = model.generate(
            ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            logits_processor=LogitsProcessorList([guard]),
            tokenizer=tokenizer if settings.stop else None,
        )
    finally:
        model.generation_config = own
    if guard.broken:
        raise NumericsError("generation: NaN logits. The variant's numbers overflow in this dtype; try `resources.dtype: float32`.")
    new_BT: torch.Tensor = out[:, ids_BP.shape[1] :]
    return new_BT


def _completion(row: list[int], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> Completion:
    end = next((i for i, token in enumerate(row) if token in settings.end_ids), None)
    tokens = _without_padding(row, tokenizer.pad_token_id) if end is None else row[: end + 1]
    shown = tokens if end is None else tokens[:-1]
    text = tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [place for stop in settings.stop if (place := text.find(stop)) >= 0]
    return Completion(tuple(tokens), text[: min(cuts)] if cuts else text, finished=end is not None or bool(cuts))


def _without_padding(row: list[int], pad_id: int) -> list[int]:
    """A row that a stop string ended early is filled up with padding."""
    length = len(row)
    while length and row[length - 1] == pad_id:
        length -= 1
    return row[:length]
