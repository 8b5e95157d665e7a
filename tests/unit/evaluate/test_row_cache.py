"""The row cache: rows that are taken, ordered and joined, against lists of columns that are plainly cut and padded.

Shapes: B rows, H heads, W columns, D head width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from transformers import DynamicCache

from transplant_ray.evaluate.row_cache import SPARE_COLUMNS, RowCache

LAYERS, HEADS, HEAD_WIDTH = 2, 2, 3
Plain = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values (B, H, W, D) by layer."""


def numbers(seed: int, rows: int, columns: int) -> Plain:
    torch.manual_seed(seed)
    sizes = (rows, HEADS, columns)
    return [(torch.randn(*sizes, HEAD_WIDTH), torch.randn(*sizes, HEAD_WIDTH + 1)) for _ in range(LAYERS)]


def append(cache: RowCache, new: Plain) -> None:
    for layer, (keys, values) in enumerate(new):
        seen = cache.update(keys, values, layer)
        assert torch.equal(seen[0], cache.layers[layer].keys)
        assert torch.equal(seen[1], cache.layers[layer].values)


def filled(seed: int, rows: int, columns: int) -> tuple[RowCache, Plain]:
    cache, plain = RowCache(), numbers(seed, rows, columns)
    append(cache, plain)
    return cache, plain


def assert_holds(cache: RowCache, plain: Plain) -> None:
    assert len(cache.layers) == len(plain)
    for layer, (keys, values) in zip(cache.layers, plain, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    width = plain[0][0].shape[2]
    assert cache.width == cache.get_seq_length() == width
    assert cache.get_mask_sizes(3, 0) == (width + 3, 0)
    assert cache.num_bytes == sum(4 * part.numel() for layer in plain for part in layer)


def join(cache: RowCache, parts: Sequence[Plain]) -> None:
    """Rows that join see themselves alone."""
    first = cache.layers[0].keys.shape[0] if cache.layers else 0
    width = max(cache.width, *(part[0][0].shape[2] for part in parts), 0)
    cache.make_room(sum(len(part[0][0]) for part in parts), width)
    for part in parts:
        slot = cache.slot(first)
        assert slot.get_seq_length() == 0
        for layer, (keys, values) in enumerate(part):
            assert slot.update(keys, values, layer) == (keys, values)
        first += len(part[0][0])


def columns_joined(one: Plain, other: Plain) -> Plain:
    return [(torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2)) for a, b in zip(one, other, strict=True)]


def rows_joined(parts: Sequence[Plain]) -> Plain:
    """Row by row, zeros on the left."""
    width = max(part[0][0].shape[2] for part in parts)

    def whole(layer: int, side: int) -> torch.Tensor:
        rows = [row for part in parts for row in part[layer][side]]
        return torch.stack([torch.cat([torch.zeros(HEADS, width - row.shape[1], row.shape[2]), row], dim=1) for row in rows])

    return [(whole(layer, 0), whole(layer, 1)) for layer in range(LAYERS)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_take_and_join_do_to_the_rows_what_they_say(seed: int) -> None:
    """After each of them columns are appended, which must not be written over what is there."""
    rng = random.Random(seed)
    plains = [numbers(seed + i, rng.randint(1, 4), rng.randint(1, 40)) for i in range(rng.randint(1, 4))]
    num_first = rng.randrange(len(plains) + 1)
    joined = RowCache()
    for group in (plains[:num_first], plains[num_first:]):
        if group:
            join(joined, group)
    plain = rows_joined(plains)
    assert_holds(joined, plain)

    for i, columns in enumerate((1, rng.choice((1, SPARE_COLUMNS + 5)), 1)):
        new = numbers(seed + 100 + i, len(plain[0][0]), columns)
        append(joined, new)
        plain = columns_joined(plain, new)
        assert_holds(joined, plain)

    rows = [rng.randrange(len(plain[0][0])) for _ in range(rng.randint(1, 5))]  # a row may be taken twice
    first = rng.randrange(joined.width)
    joined.take(torch.tensor(rows), first)
    plain = [(keys[rows][:, :, first:], values[rows][:, :, first:]) for keys, values in plain]
    assert_holds(joined, plain)
    new = numbers(seed + 200, len(rows), 1)
    append(joined, new)
    assert_holds(joined, columns_joined(plain, new))


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("new_memory_is_nan")
def test_padding_is_zero_for_what_is_masked_is_multiplied_too() -> None:
    """Whatever the memory held before: zero times NaN is NaN."""
    assert torch.empty(3).isnan().all()
    joined = filled(1, 1, 50)[0]
    join(joined, [numbers(0, 1, 2)])
    for layer in joined.layers:
        for part in (layer.keys, layer.values):
            assert torch.equal(part[1, :, :48], torch.zeros_like(part[1, :, :48]))
            assert not (part[0] == 0).any()


def test_steps_within_the_spare_room_copy_nothing() -> None:
    cache = RowCache()
    join(cache, [numbers(0, 2, 5)])
    start = cache.layers[0].keys.data_ptr()
    for i in range(SPARE_COLUMNS):
        append(cache, numbers(i, 2, 1))
        assert cache.layers[0].keys.data_ptr() == start
    append(cache, numbers(0, 2, 1))
    assert cache.layers[0].keys.data_ptr() != start


def test_an_empty_cache_has_no_width() -> None:
    assert RowCache().width == 0
    assert RowCache().num_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.inference_mode()
def test_a_model_sees_in_it_what_it_sees_in_its_own(family: str) -> None:
    """More columns than the sliding window of 16."""
    model = tiny_model(family)
    ids = torch.randint(3, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    for cache in (RowCache(), DynamicCache(config=model.config)):
        steps = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :20], *ids[:, 20:].split(1, 1))
        ]
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
