"""How far a variant's predictions moved from the target's on text that nobody judges: KL(target ‖ variant), token by token.

Shapes: T predicted tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING

import torch

from transplant_ray.evaluate.decode import pass_tokens
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.read import LOGITS
from transplant_ray.evaluate.teacher_forcing import lay_out, logits_at
from transplant_ray.models.rope import forget_longest, rope_boundary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGET = -1

Pick = Callable[[Sequence[int]], None]
"""Gives every row of the next pass its variant, by number, or TARGET."""
Asked = tuple[int, Rendered]
"""A variant, by number, and a text: its first token is the prompt, and what follows is predicted."""


@torch.inference_mode()
def diverge(
    model: PreTrainedModel, asked: Sequence[Asked], pick: Pick, rows: int, *, together: bool
) -> Iterator[tuple[int, float | None]]:
    """(index of what was asked, mean KL in nats a token); None where a logit was NaN. At most `rows` a pass, and at least 2.

    The target reads every text beside the variants, so that no table of its predictions is kept. `together` says that rows of
    different variants may share a pass; where they may not, each has one of its own.
    """
    boundary = rope_boundary(model.config)
    for text, members in groupby(range(len(asked)), key=lambda index: asked[index][1]):
        indices = list(members)
        size = _most_rows(model, text, rows) - 1
        for start in range(0, len(indices), size):
            if boundary is not None:
                forget_longest(model)
            part = indices[start : start + size]
            variants = [TARGET, *(asked[index][0] for index in part)]
            passes = [variants] if together else [[variant] for variant in variants]
            logits = [row_TV for chosen in passes for row_TV in _logits(model, text, chosen, pick)]
            yield from zip(part, _divergences(logits), strict=True)


def _most_rows(model: PreTrainedModel, text: Rendered, rows: int) -> int:
    tokens = len(text.answer_ids)
    fitting = min(2 * pass_tokens(model) // tokens, LOGITS // (tokens * model.config.vocab_size))
    return max(2, min(rows, int(fitting)))


def _logits(model: PreTrainedModel, text: Rendered, variants: Sequence[int], pick: Pick) -> Sequence[torch.Tensor]:
    pick(variants)
    ids_BS, place_N = lay_out([text.prompt_ids] * len(variants), [text.answer_ids] * len(variants), model.device)
    return torch.split(logits_at(model, ids_BS, place_N), len(text.answer_ids))


def _divergences(logits: Sequence[torch.Tensor]) -> Iterator[float | None]:
    target_TV = logits[0].log_softmax(-1)
    share_TV = target_TV.exp()
    for other_TV in logits[1:]:
        mean = float((share_TV * (target_TV - other_TV.log_softmax(-1))).sum(-1).mean())
        yield max(mean, 0.0) if isfinite(mean) else None  # rounding alone takes it below 0
