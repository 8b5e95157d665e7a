"""Activation statistics: one number per module for every decode step of every probe example.

Shapes: B examples of a batch, S positions, N = decode steps of the batch, M modules, D a module's output width.

A decode step is the forward pass at the position whose output gives the next token: step 1 is the last token of the prompt. A
trajectory is replayed in one forward pass: under a causal mask, the output at a position is what decoding computed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, generate, length_batches
from transplant_ray.models.rope import rope_boundary

Continuations = Mapping[str, tuple[int, ...]]
"""Example id → the tokens that follow its prompt, the end token included."""
Key = tuple[str, int]
"""(example id, step), steps from 1."""


@dataclass(frozen=True)
class ActivationStats:
    """values[i, j] = mean |output| of module j at step keys[i], float32 (N, M). Parts merge; keys never repeat."""

    modules: tuple[str, ...]
    keys: tuple[Key, ...]
    values: NDArray[np.float32]

    @classmethod
    def merge(cls, parts: Sequence[ActivationStats]) -> ActivationStats:
        """All rows of `parts`, each key once: a part that was streamed twice counts once."""
        rows = {key: row for part in parts for key, row in zip(part.keys, part.values, strict=True)}
        return cls(parts[0].modules, tuple(rows), np.stack(list(rows.values())))


def stream_stats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    modules: Sequence[str],
    settings: GenerationSettings,
    continuations: Continuations | None = None,
) -> Iterator[ActivationStats]:
    """Statistics batch by batch, along `continuations`, or along the model's own greedy text where None.

    Deterministic, so that a stream that is started again gives the same items. NumericsError where a statistic is not finite.
    """
    lengths = [len(example.prompt_ids) for example in examples]
    for batch in length_batches(lengths, settings.batch_size, settings.max_new_tokens, rope_boundary(model.config)):
        chosen = [examples[index] for index in batch]
        texts = greedy_continuations(model, tokenizer, chosen, settings) if continuations is None else continuations
        yield replay(model, chosen, [texts[e.id][: settings.max_new_tokens] for e in chosen], modules)


def greedy_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    settings: GenerationSettings,
) -> dict[str, tuple[int, ...]]:
    completions = generate(model, tokenizer, [example.prompt_ids for example in examples], settings)
    return {example.id: completion.token_ids for example, completion in zip(examples, completions, strict=True)}


@torch.inference_mode()
def replay(
    model: PreTrainedModel, examples: Sequence[Rendered], texts: Sequence[Sequence[int]], modules: Sequence[str]
) -> ActivationStats:
    """One forward pass over prompts and texts; the last token of a text is never fed, for no step reads it."""
    rows = [[*example.prompt_ids, *text[:-1]] for example, text in zip(examples, texts, strict=True)]
    width = max(map(len, rows))
    ids_BS = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask_BS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    steps = [(b, e, s) for b, (e, text) in enumerate(zip(examples, texts, strict=True)) for s in range(len(text))]
    place_N = torch.tensor([b * width + len(e.prompt_ids) - 1 + s for b, e, s in steps], device=model.device)
    with mean_magnitudes(model, modules, place_N) as magnitudes:
        model.base_model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
    values_NM = torch.stack([magnitudes[name].to(model.device) for name in modules], dim=1).cpu().numpy()
    _check_finite(values_NM, modules)
    return ActivationStats(tuple(modules), tuple((e.id, s + 1) for _, e, s in steps), values_NM)


@contextmanager
def mean_magnitudes(model: nn.Module, modules: Sequence[str], place_N: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Hooks that reduce each module's output (B, S, D) to (1/D)·‖h‖₁ at the given places, on the device.

    A place is row · S + position. Padding is never among them, so it never counts. Eq. 5 of arXiv:2602.16189. The hooks are gone
    after the block.
    """
    magnitudes: dict[str, torch.Tensor] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def reduce(_module: nn.Module, _args: object, output_BSD: torch.Tensor) -> None:
            places = place_N.to(output_BSD.device)
            chosen_ND = output_BSD.flatten(0, 1).index_select(0, places)  # a third of the time of indexing with two tensors
            magnitudes[name] = chosen_ND.abs_().mean(-1, dtype=torch.float32)  # in place: the selection is a copy

        return model.get_submodule(name).register_forward_hook(reduce)

    handles = [hook(name) for name in modules]
    try:
        yield magnitudes
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(values_NM: NDArray[np.float32], modules: Sequence[str]) -> None:
    finite_M = np.isfinite(values_NM).all(axis=0)
    if not finite_M.all():
        broken = [modules[index] for index in np.flatnonzero(~finite_M).tolist()]
        raise NumericsError(
            f"probe: the activations of {broken[0]} are not finite ({len(broken)} modules). They overflow in this dtype; try "
            "`resources.dtype: float32`, or check the checkpoint."
        )
