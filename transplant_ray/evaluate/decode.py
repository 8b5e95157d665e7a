"""Greedy decoding in which finished rows stop costing: rows leave the batch when they end, and waiting prompts take their room.

Shapes: B rows in flight, P prompt columns, T new tokens so far, V vocabulary.

`transformers` decodes a static batch to its longest row (docs/decisions/0007). Here a batch has a target size, `rows`; whenever an
eighth of its rows has ended they are dropped from the key-value cache, and whenever half of its room is free, waiting prompts are
prefilled and join it. Rows end at the same column; a shorter one is padded on the left.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from transplant_ray.evaluate.generate import Completion, GenerationSettings, TokenIds, complete, holds_stop, left_padded
from transplant_ray.evaluate.row_cache import RowCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Assign = Callable[[Sequence[int]], None]
"""Told which prompts the rows of the next forward passes belong to, by their indices, ascending."""

Decoded = tuple[int, Completion | None]
"""Index of a prompt and what followed it; None where a logit was NaN."""

PASS_TOKENS = {"cpu": 1024}
MANY_PASS_TOKENS = 8192
"""Prompt tokens in one forward pass, by type of device: enough to fill it, and on CPU little enough for its caches."""
DROP_SHARE, REFILL_SHARE = 1 / 8, 1 / 2
STOP_WINDOW = 32
"""Last tokens of a row that are searched for a stop string at each step; the whole text is searched at the end."""
CLOSE_GAP = 1e-3
"""Two best logits closer than this may change places with the shape of a batch."""


def can_decode(model: PreTrainedModel) -> bool:
    """Whether the model takes a key-value cache of ours and explicit positions; others need `generate`."""
    inputs = _inputs(model)
    return {"position_ids", "past_key_values", "attention_mask"} <= inputs and not getattr(model, "_is_stateful", False)


def _inputs(model: PreTrainedModel) -> frozenset[str]:
    """What the forward of a model takes."""
    kind: Any = type(model)
    return _inputs_of_class(kind)


@cache
def _inputs_of_class(kind: Any) -> frozenset[str]:
    """Looking it up costs as much as a step of a small model."""
    return frozenset(inspect.signature(kind.forward).parameters)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    settings: GenerationSettings,
    assign: Assign,
    rows: int,
) -> Iterator[Decoded]:
    """Greedy completions of `prompts` as they end, each with its index.

    At most `rows` are in flight; they are taken up in the given order. What a row says does not depend on its neighbours, up to
    rounding; the caller keeps rows apart that a rotary embedding would mix.
    """
    waiting = deque(range(len(prompts)))
    flight: _Flight | None = None
    while waiting or flight:
        free = rows - (len(flight.index) if flight else 0)
        if waiting and free >= min(rows * REFILL_SHARE, len(waiting)):
            joining = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            flight = _admit(flight or _Flight.empty(settings, model.device), joining, prompts, model, tokenizer, assign)
            assign(flight.index)
        elif flight:
            flight.step(model, tokenizer)
        if flight and flight.worth_dropping(rows, bool(waiting)):
            yield from flight.drop(tokenizer)
            flight = flight if flight.index else None
            if flight:
                assign(flight.index)


def pass_tokens(model: PreTrainedModel) -> int:
    return PASS_TOKENS.get(model.device.type, MANY_PASS_TOKENS)


def _parts(indices: Sequence[int], prompts: Sequence[TokenIds], most: int) -> Iterator[list[int]]:
    """Consecutive prompts, as many as one prefill takes."""
    part: list[int] = []
    width = 0
    for index in indices:
        width = max(width, len(prompts[index]))
        if part and width * (len(part) + 1) > most:
            yield part
            part, width = [], len(prompts[index])
        part.append(index)
    yield part


class _Flight:
    """The rows that are being decoded, in ascending order of their prompts."""

    def __init__(self, index: list[int], settings: GenerationSettings, cache: RowCache, rows: _Rows) -> None:
        self.index = index
        self.settings = settings
        self.cache = cache
        self.rows = rows
        self.ends_E = torch.tensor(settings.end_ids, dtype=torch.long, device=rows.pad_B.device)
        self.num_done = int(rows.done_B.sum())

    @classmethod
    def empty(cls, settings: GenerationSettings, device: torch.device) -> _Flight:
        return cls([], settings, RowCache(), _Rows.start([], 0, settings.max_new_tokens, device))

    def step(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """One more token for every row."""
        rows, width = self.rows, self.cache.width
        mask_BW = None
        if rows.padded:
            mask_BW = torch.arange(width + 1, device=rows.pad_B.device) >= rows.pad_B[:, None]
        position_B = (width - rows.pad_B).masked_fill(rows.done_B, 0)  # a row that has ended leads nobody over a boundary
        logits_BV = _forward(model, rows.last_B[:, None], mask_BW, position_B[:, None], self.cache)
        self.take(logits_BV, tokenizer)

    def take(self, logits_BV: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
        """Append the greedy tokens and note which rows have ended."""
        rows, settings = self.rows, self.settings
        best_B2, token_B2 = logits_BV.topk(2)
        live_B = ~rows.done_B
        rows.close_B += live_B & (best_B2[:, 0] - best_B2[:, 1] < CLOSE_GAP)
        rows.broken_B |= live_B & best_B2[:, 0].isnan()  # NaN sorts above every number
        rows.last_B = token_B2[:, 0]
        rows.new_BT.scatter_(1, rows.count_B[:, None], rows.last_B[:, None])
        rows.count_B += live_B
        ended_B = rows.broken_B | (rows.count_B >= settings.max_new_tokens) | torch.isin(rows.last_B, self.ends_E)
        if settings.stop:
            ended_B |= self._stopped(tokenizer)
        rows.done_B |= ended_B
        self.num_done = int(rows.done_B.sum())

    def worth_dropping(self, target: int, others_wait: bool) -> bool:
        """Dropping copies the cache, so it waits until it saves more than it costs, or until the room is wanted."""
        room = target - len(self.index) + self.num_done
        wanted = others_wait and room >= target * REFILL_SHARE
        return self.num_done > 0 and (wanted or self.num_done >= len(self.index) * DROP_SHARE)

    def drop(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Decoded]:
        """Give out the rows that have ended and keep the others."""
        rows = self.rows
        done, tokens, counts, close, broken = (
            part.tolist() for part in (rows.done_B, rows.new_BT, rows.count_B, rows.close_B, rows.broken_B)
        )
        for row in (row for row, is_done in enumerate(done) if is_done):
            text = None if broken[row] else complete(tokens[row][: counts[row]], tokenizer, self.settings, close[row])
            yield self.index[row], text
        stay = [row for row, is_done in enumerate(done) if not is_done]
        self.index, self.num_done = [self.index[row] for row in stay], 0
        if stay:
            keep = torch.tensor(stay, device=rows.pad_B.device)
            first = int(rows.pad_B[keep].min())
            self.cache.take(keep, first)
            self.rows = rows.take(keep, first)

    def _stopped(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """A hit in the last tokens is looked at again in the whole text: a window may begin within a character."""
        rows, stop = self.rows, self.settings.stop
        found = []
        for tokens, count in zip(rows.new_BT.tolist(), rows.count_B.tolist(), strict=True):
            near = holds_stop(tokens[max(0, count - STOP_WINDOW) : count], tokenizer, stop)
            found.append(near and holds_stop(tokens[:count], tokenizer, stop))
        return torch.tensor(found, device=rows.done_B.device)


@dataclass
class _Rows:
    """What is known of every row in flight."""

    pad_B: torch.Tensor
    """Columns of padding."""
    last_B: torch.Tensor
    """The newest token."""
    new_BT: torch.Tensor
    """Tokens so far. T is the limit and one more: what a row says after its end is written there, and never read."""
    count_B: torch.Tensor
    close_B: torch.Tensor
    """Steps at which the two best logits were close."""
    done_B: torch.Tensor
    broken_B: torch.Tensor

    def __post_init__(self) -> None:
        self.padded = bool(self.pad_B.any())

    @classmethod
    def start(cls, lengths: Sequence[int], width: int, limit: int, device: torch.device) -> _Rows:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(len(lengths), *shape, dtype=dtype, device=device)

        return cls(
            pad_B=width - torch.tensor(lengths, dtype=torch.long, device=device),
            last_B=zeros(),
            new_BT=zeros(limit + 1),
            count_B=zeros(),
            close_B=zeros(),
            done_B=zeros(dtype=torch.bool),
            broken_B=zeros(dtype=torch.bool),
        )

    def take(self, keep: torch.Tensor, first: int) -> _Rows:
        return _Rows(self.pad_B[keep] - first, *(part[keep] for part in self._but_padding()))

    def shifted(self, columns: int) -> _Rows:
        """With so many columns of padding more."""
        return replace(self, pad_B=self.pad_B + columns)

    @classmethod
    def join(cls, parts: Sequence[_Rows]) -> _Rows:
        """The rows of all parts, which end at the same column."""
        return cls(*(torch.cat(same) for same in zip(*((part.pad_B, *part._but_padding()) for part in parts), strict=True)))

    def _but_padding(self) -> tuple[torch.Tensor, ...]:
        return self.last_B, self.new_BT, self.count_B, self.close_B, self.done_B, self.broken_B


def _admit(
    flight: _Flight,
    joining: Sequence[int],
    prompts: Sequence[TokenIds],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    assign: Assign,
) -> _Flight:
    """The flight with these prompts too, read and with their first new token. They are later ones, so rows stay in order."""
    cache, width = flight.cache, max(flight.cache.width, *(len(prompts[i]) for i in joining))
    index, rows = list(flight.index), [flight.rows.shifted(width - cache.width)]
    cache.make_room(len(joining), width)
    for part in _parts(joining, prompts, pass_tokens(model)):
        assign(part)
        arriving = [prompts[i] for i in part]
        ids_BP, mask_BP = left_padded(arriving, tokenizer.pad_token_id, model.device)
        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        slot = cache.slot(len(index))
        logits_BV = _forward(model, ids_BP, None if bool(mask_BP.all()) else mask_BP, positions_BP, slot)
        lengths = list(map(len, arriving))
        new = _Flight(part, flight.settings, cache, _Rows.start(lengths, width, flight.settings.max_new_tokens, model.device))
        new.take(logits_BV, tokenizer)
        index, rows = index + part, [*rows, new.rows]
    return _Flight(index, flight.settings, cache, _Rows.join(rows))


def last_logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Logits (B, V) in float32 after the last column; a model that can leaves the others out."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in _inputs(model) else {}
    logits: torch.Tensor = model(**inputs, **keep).logits[:, -1].float()
    return logits


def _forward(
    model: PreTrainedModel, ids_BS: torch.Tensor, mask_BW: torch.Tensor | None, positions_BS: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Logits (B, V) after the last column."""
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BW, "position_ids": positions_BS}
    return last_logits(model, **inputs, past_key_values=cache, use_cache=True)
