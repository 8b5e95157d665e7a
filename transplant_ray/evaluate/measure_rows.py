"""How many rows a device likes in one decode step: measured, for no formula knows both a laptop's caches and a GPU's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
from transformers import PreTrainedModel

from transplant_ray.evaluate.decode import can_decode, last_logits
from transplant_ray.evaluate.row_cache import RowCache

STEPS = 3
WORTH = 0.9
"""A larger batch must take less than this share of the time per row, for it costs memory."""
FIRST = 16
MEMORY_SHARE = 0.8
"""Of the GPU memory that is free after loading."""
WITHOUT_DECODE = 64


@torch.inference_mode()
def measure_rows(model: PreTrainedModel, columns: int, most: int) -> int:
    """Rows to have in flight: the smallest power of two after which a row gets no cheaper. At most `most`, and what memory holds.

    `columns` is the length of the longest row, prompt and new tokens. A model that `decode` cannot take has the usual batch of 64.
    """
    if not can_decode(model):
        return min(WITHOUT_DECODE, most)
    one = RowCache()
    token = torch.zeros(1, columns - 1, dtype=torch.long, device=model.device)
    last_logits(model, 1, input_ids=token, past_key_values=one, use_cache=True)
    best, cheapest = 1, float("inf")
    for rows in _sizes(min(most, _rows_in_memory(one, model.device))):
        seconds = _seconds_per_row(model, one, rows)
        if seconds > WORTH * cheapest:
            break
        best, cheapest = rows, seconds
    return best


def _sizes(most: int) -> Iterator[int]:
    rows = FIRST
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _seconds_per_row(model: PreTrainedModel, one: RowCache, rows: int) -> float:
    cache = RowCache.join([one], [torch.zeros(1, dtype=torch.long)])
    cache.take(torch.zeros(rows, dtype=torch.long), first=0)
    token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        last_logits(model, 1, input_ids=token, past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:]) / rows


def _rows_in_memory(one: RowCache, device: torch.device) -> int:
    """On a GPU, how many such rows fit beside what is loaded. On CPU there is no telling: what runs out is halved."""
    if device.type != "cuda":
        return 2**30
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(free * MEMORY_SHARE) // one.num_bytes)
