"""Spoilt parts of a ledger, under a wrong name and under the hash of their bytes: outcomes, or set aside and done again."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import Hand

from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.ledger import SCHEMA, Ledger, asked
from transplant_ray.evaluate.outcome import Outcome, Tally
from transplant_ray.shelf import Shelf

EXAMPLES = tuple(Rendered(f"e{i}", (1, i + 5), (2,), f"a{i}") for i in range(6))
OUTCOMES = tuple(Outcome("v", example.id, "it says", True, 3, True) for example in EXAMPLES)
ROWS = [{**asdict(outcome), "asked": asked(example), "seconds": 0.5} for outcome, example in zip(OUTCOMES, EXAMPLES, strict=True)]
PAGE = "0" * 32


def part(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def named(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}.parquet"


def put(folder: Path, content: bytes, name: str | None = None) -> Path:
    """A part of the page, by default under the name that its bytes have."""
    path = folder / PAGE / (name or named(content))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def spoilt_rows(hand: Hand) -> bytes:
    """Rows of values that the schema takes and no outcome should have, or of another schema."""
    rows = [dict(row) for row in ROWS]
    for _ in range(hand.random.choice((1, 3))):
        row = hand.random.choice(rows)
        row[hand.random.choice(SCHEMA.names)] = hand.value()
    try:
        return part(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        kept = hand.random.sample(list(SCHEMA), hand.random.randint(1, len(SCHEMA)))
        return part(ROWS, pa.schema(kept))


def spoilt_part(seed: int) -> tuple[bytes, str | None]:
    """The bytes, and a name where it is not theirs."""
    hand = Hand(f"ledger {seed}")
    content = spoilt_rows(hand) if seed % 2 else hand.bytes(part(ROWS))
    return content, named(part(ROWS)) if seed % 5 == 0 and content != part(ROWS) else None


def check_recalled_or_redone(folder: Path) -> list[str]:
    """What the ledger says of its parts; it is whole again afterwards, and whatever came out of it can be counted."""
    notes: list[str] = []
    ledger = Ledger(Shelf(str(folder)), notes.append)
    found = ledger.recall(PAGE, "v", EXAMPLES)
    answers = Answers()
    answers.add("select", found)
    if found.outcomes:
        assert isfinite(Tally.of(found.outcomes, found.seconds).score)
    ledger.keep(PAGE, VariantShard("v", OUTCOMES, 1.0), EXAMPLES)
    ledger.write()
    again = Ledger(Shelf(str(folder)), notes.append)
    assert {outcome.example for outcome in again.recall(PAGE, "v", EXAMPLES).outcomes} == {example.id for example in EXAMPLES}
    return notes


@pytest.mark.parametrize("seed", range(220))
def test_a_spoilt_part_is_recalled_or_set_aside_and_redone(tmp_path: Path, seed: int) -> None:
    content, name = spoilt_part(seed)
    path = put(tmp_path, content, name)
    notes = check_recalled_or_redone(tmp_path)
    assert notes == (
        [] if path.exists() else [f"ledger: {PAGE}/{path.name} is damaged and set aside; what it held is evaluated again"]
    )
    assert path.exists() or path.with_name(f"{path.name}.damaged").read_bytes() == content
    assert path.exists() or name is None or content != part(ROWS)


def test_some_are_recalled_and_some_are_set_aside(tmp_path: Path) -> None:
    kept = set()
    for seed in range(40):
        (tmp_path / str(seed)).mkdir()
        path = put(tmp_path / str(seed), *spoilt_part(seed))
        Ledger(Shelf(str(tmp_path / str(seed))), lambda _: None).recall(PAGE, "v", EXAMPLES)
        kept.add(path.exists())
    assert kept == {True, False}


# What the hand has found: the hash of its bytes says that a part is as it was written, and not who wrote it.


@pytest.mark.parametrize("column", sorted({*SCHEMA.names} - {"error", "loss"}))
def test_an_outcome_that_lacks_something_is_set_aside(tmp_path: Path, column: str) -> None:
    put(tmp_path, part([*ROWS[1:], {**ROWS[0], column: None}]))
    assert len(check_recalled_or_redone(tmp_path)) == 1


@pytest.mark.parametrize("column", ["loss", "seconds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_set_aside(tmp_path: Path, column: str, value: float) -> None:
    put(tmp_path, part([*ROWS[1:], {**ROWS[0], column: value}]))
    assert len(check_recalled_or_redone(tmp_path)) == 1


def test_text_that_is_no_utf8_is_set_aside(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS, schema=SCHEMA)
    text = table["completion"].combine_chunks()
    lengths, _ = text.buffers()[1:]
    spoilt = pa.StringArray.from_buffers(len(ROWS), lengths, pa.py_buffer(b"\xff" * 7 * len(ROWS)))
    sink = io.BytesIO()
    pq.write_table(table.set_column(SCHEMA.get_field_index("completion"), SCHEMA.field("completion"), spoilt), sink)
    put(tmp_path, sink.getvalue())
    assert len(check_recalled_or_redone(tmp_path)) == 1
