"""Rows to have in flight: whatever the clock says, a power of two or the most that is allowed. No test looks at a duration."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from transformers import PreTrainedModel

from transplant_ray.evaluate import measure_rows as module
from transplant_ray.evaluate.measure_rows import FIRST, WITHOUT_DECODE, measure_rows


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("most", [1, 3, 16, 20, 64])
def test_it_is_a_power_of_two_or_the_most(llama: PreTrainedModel, most: int) -> None:
    rows = measure_rows(llama, columns=12, most=most)
    assert 1 <= rows <= most
    assert rows == most or rows & (rows - 1) == 0


@pytest.mark.parametrize(
    ("seconds_per_row", "most", "expected"),
    [
        ({}, 100, 100),  # always half of the time before
        ({32: 1.0}, 100, FIRST),
        ({64: 1.0}, 100, 32),
        ({100: 1.0}, 100, 64),
        ({64: 0.95 / 32}, 500, 32),  # cheaper, and not by enough
        ({}, 7, 7),
        ({}, FIRST, FIRST),
    ],
)
def test_it_is_the_last_size_that_was_worth_it(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, seconds_per_row: dict[int, float], most: int, expected: int
) -> None:
    monkeypatch.setattr(module, "_seconds_per_row", lambda _model, _one, rows: seconds_per_row.get(rows, 1 / rows))
    assert measure_rows(llama, columns=12, most=most) == expected


def test_memory_has_the_last_word(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_seconds_per_row", lambda _model, _one, rows: 1 / rows)
    monkeypatch.setattr(module, "_rows_in_memory", lambda _one, _device: 24)
    assert measure_rows(llama, columns=12, most=1000) == 24


@pytest.mark.parametrize(("most", "expected"), [(1000, WITHOUT_DECODE), (5, 5)])
def test_a_model_that_cannot_be_decoded_has_the_usual_batch(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    monkeypatch.setattr(llama, "_is_stateful", True, raising=False)
    assert measure_rows(llama, columns=12, most=most) == expected


@pytest.mark.xfail(raises=IndexError, strict=True, reason="measuring takes four steps after the longest row")
def test_learned_positions_are_not_left() -> None:
    assert measure_rows(tiny_model("gpt2"), columns=128, most=16) == 16
