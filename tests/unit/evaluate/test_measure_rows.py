"""Rows to have in flight: whatever the clock says, a power of two or the most that is allowed. No test looks at a duration."""

from __future__ import annotations

from collections.abc import Callable

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


COSTS: dict[str, Callable[[int], float]] = {
    "falling": lambda rows: 1 / rows,
    "flat": lambda _: 1.0,
    "rising": lambda rows: float(rows),
    "least at 64": lambda rows: abs(rows - 64) + 1.0,
}
"""Seconds per row by rows, so clear that any sensible rule says the same."""


@pytest.mark.parametrize(
    ("cost", "most", "expected"),
    [
        ("falling", 1000, 1000),
        ("falling", 7, 7),
        ("flat", 1000, FIRST),
        ("flat", 7, 7),
        ("rising", 1000, FIRST),
        ("least at 64", 1000, 64),
        ("least at 64", 40, 40),
    ],
)
def test_it_is_the_smallest_size_at_which_rows_are_cheap(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, cost: str, most: int, expected: int
) -> None:
    monkeypatch.setattr(module, "_seconds_per_row", lambda _model, _one, rows: COSTS[cost](rows))
    monkeypatch.setattr(module, "_rows_in_memory", lambda _one, _device: 2**30)
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


def test_learned_positions_are_not_left() -> None:
    assert measure_rows(tiny_model("gpt2"), columns=128, most=16) == 16
