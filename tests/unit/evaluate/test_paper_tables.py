"""The paper's table, from counts of its 50 questions: TIR and Recovery come out, and so does what such a table can show."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest

from transplant_ray.evaluate.metrics import recovery, tir
from transplant_ray.evaluate.significance import ALPHA, Right, mcnemar, recovery_interval

N = 50


@dataclass(frozen=True)
class Row:
    tokens: int
    direction: str
    target: int
    """Right answers of 50."""
    source: int
    after: int
    k: int
    tir: str
    """As printed."""
    recovery: str | None
    """Percent, as printed."""


TABLE = [
    Row(32, "3.5→3", 3, 4, 6, 16, "2.00", "300"),
    Row(64, "3→3.5", 8, 10, 10, 16, "1.25", "100"),
    Row(128, "3→3.5", 8, 15, 13, 64, "1.63", "71.4"),
    Row(256, "3→3.5", 17, 17, 18, 8, "1.06", None),
    Row(512, "3.5→3", 18, 20, 20, 8, "1.11", "100"),
    Row(32, "base→IT", 3, 5, 5, 128, "1.67", "100"),
    Row(64, "IT→base", 4, 4, 4, 32, "1.00", None),
    Row(128, "IT→base", 3, 11, 5, 64, "1.67", "25.0"),
    Row(256, "IT→base", 3, 18, 6, 64, "2.00", "20.0"),
    Row(512, "IT→base", 3, 15, 7, 64, "2.33", "33.3"),
]


def printed(value: float, like: str) -> str:
    """Rounded as the paper does, halves up: 1.625 is 1.63 there."""
    return str(Decimal(repr(round(value, 12))).quantize(Decimal(like), rounding=ROUND_HALF_UP))


def first(correct: int) -> Right:
    """The first questions right: two such vectors differ as little as they can."""
    return np.arange(N) < correct


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.direction} {row.tokens}")
def test_the_row_comes_out_of_its_counts(row: Row) -> None:
    after, target, source = row.after / N, row.target / N, row.source / N
    ratio, closed = tir(after, target=target), recovery(after, target=target, source=source)
    assert ratio is not None
    assert printed(ratio, row.tir) == row.tir
    assert (None if closed is None or row.recovery is None else printed(100 * closed, row.recovery)) == row.recovery
    assert (closed is None) == (row.source == row.target)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.direction} {row.tokens}")
def test_no_row_shows_a_gain(row: Row) -> None:
    """Even if no question was lost, which the table does not say: at most 5 more of 50."""
    assert row.after - row.target <= 5
    assert mcnemar(first(row.target), first(row.after)).p > ALPHA


def test_300_percent_are_a_gap_of_one_question() -> None:
    interval = recovery_interval(first(6), target=first(3), source=first(4))
    assert (interval.low, interval.high) == (None, None)
    assert interval.reason is not None
    assert interval.reason.startswith("the gap between source and target may be 0")
