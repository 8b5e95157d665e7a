"""Teacher forcing: one forward pass over prompts and the texts that follow them says what decoding said at every step.

Shapes: B rows, S positions, N tokens of all texts, V vocabulary. A place is row · S + position.

Rows are padded on the right and go without a mask: under a causal one, no position sees what stands to its right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from transplant_ray.evaluate.generate import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lay_out(prompts: Sequence[TokenIds], texts: Sequence[TokenIds], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S), and the places (N,) whose outputs give the tokens of the texts, text by text.

    The last token of a text is never fed, for no step reads it.
    """
    rows = [[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
    width = max(map(len, rows))
    ids_BS = np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int64)  # torch takes lists five times as long
    starts = [row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)]
    places = [place for start, text in zip(starts, texts, strict=True) for place in range(start, start + len(text))]
    return torch.from_numpy(ids_BS).to(device), torch.from_numpy(np.array(places, dtype=np.int64)).to(device)


def logits_at(model: PreTrainedModel, ids_BS: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) in float32 at these places: the head sees no others."""

    def choose(_head: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BSH = inputs[0]
        return hidden_BSH.flatten(0, 1).index_select(0, place_N.to(hidden_BSH.device))[None], *inputs[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        logits_1NV: torch.Tensor = model(input_ids=ids_BS, use_cache=False).logits
    finally:
        handle.remove()
    return logits_1NV[0].float()
