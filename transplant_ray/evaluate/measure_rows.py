"""How many rows a device likes in one decode step: measured, for no formula knows both a laptop's caches and a GPU's bandwidth."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from transplant_ray.evaluate.decode import can_decode, last_logits
from transplant_ray.evaluate.row_cache import RowCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 4
WORTH = 1.1
"""The smallest batch is taken whose rows cost at most this much of the cheapest, for a larger one takes more memory."""
PATIENCE = 2
"""So many sizes in a row may bring nothing before larger ones are not tried."""
BUDGET_SECONDS = 5
FIRST = 16
MEMORY_SHARE = 0.7
"""Of the memory that is free after loading; the rest is for what a step computes."""
WITHOUT_DECODE = 64


@torch.inference_mode()
def measure_rows(model: PreTrainedModel, columns: int, most: int) -> int:
    """Rows to have in flight: the smallest power of two after which a row gets no cheaper. At most `most`, and what memory holds.

    `columns` is the length of the longest row, prompt and new tokens. A model that `decode` cannot take has the usual batch of 64.
    """
    if not can_decode(model):
        return min(WITHOUT_DECODE, most)
    one = RowCache()
    token = torch.zeros(1, max(1, columns - STEPS), dtype=torch.long, device=model.device)  # no position past the longest row
    last_logits(model, input_ids=token, past_key_values=one, use_cache=True)
    seconds: dict[int, float] = {}
    start = time.perf_counter()
    for rows in _sizes(min(most, _rows_in_memory(one, model.device))):
        seconds[rows] = _seconds_per_row(model, one, rows)
        cheapest = min(seconds, key=lambda tried: seconds[tried])
        if list(seconds).index(cheapest) < len(seconds) - PATIENCE or time.perf_counter() - start > BUDGET_SECONDS:
            break
    return min(rows for rows in seconds if seconds[rows] <= WORTH * seconds[cheapest])


def _sizes(most: int) -> Iterator[int]:
    rows = FIRST
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _seconds_per_row(model: PreTrainedModel, one: RowCache, rows: int) -> float:
    cache = deepcopy(one)
    cache.take(torch.zeros(rows, dtype=torch.long), first=0)
    token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        last_logits(model, input_ids=token, past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / rows


def _rows_in_memory(one: RowCache, device: torch.device) -> int:
    """How many such rows fit beside what is loaded."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, int(free * MEMORY_SHARE) // one.num_bytes)
