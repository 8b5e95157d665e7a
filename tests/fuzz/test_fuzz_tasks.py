"""Spoilt task files, JSONL and Parquet: examples as token ids, or a DataError."""

from __future__ import annotations

import datetime
import decimal
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import JSON_TEXTS, Hand, ends_well
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from transplant_ray.errors import DataError, RunError
from transplant_ray.evaluate.prepared import Prepared, prepare_task
from transplant_ray.recipe import TaskSpec
from transplant_ray.tables import read_rows

NUM_ROWS = 14
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "options": [str(n + 1), "x"], "level": n} for n in range(NUM_ROWS)]
TOKENIZER = tiny_tokenizer()
SPECS: tuple[dict[str, Any], ...] = (
    {}, {"shots": {"num": 2}}, {"prompt": "{level}"}, {"prompt": "{prompt} {options}"}, {"answer": "{level}"},
    {"scorer": "choice", "choices": "options", "max_new_tokens": None}, {"scorer": "loss", "max_new_tokens": None, "prompt": ""},
)  # fmt: skip


def array(value: Any, kind: pa.DataType) -> pa.Array:
    return pa.array([value] * NUM_ROWS, kind)


def not_utf8() -> pa.Array:
    lengths = pa.array(["ab"] * NUM_ROWS).buffers()[1]
    return pa.StringArray.from_buffers(NUM_ROWS, lengths, pa.py_buffer(b"\xff\xfe" * NUM_ROWS))


PYTHON_CANNOT: Mapping[str, Callable[[], pa.Array]] = {
    "the year 5 million": lambda: array(2**31 - 1, pa.date32()),
    "the year 148107": lambda: array(2**62, pa.timestamp("us")),
    "a duration of ages": lambda: array(2**62, pa.duration("s")),
    "a time zone that is none": lambda: array(1, pa.timestamp("us", "Nowhere/Here")),
    "text that is no UTF-8": not_utf8,
}
"""Columns that Parquet holds and Python cannot."""
COLUMNS: tuple[Callable[[], pa.Array], ...] = (
    *PYTHON_CANNOT.values(), lambda: array(1, pa.timestamp("ns")), lambda: array(86_399_999, pa.time32("ms")),
    lambda: array(1, pa.time64("ns")),
    lambda: array(float("nan"), pa.float64()), lambda: array(b"\xff\xfe", pa.binary()),
    lambda: array(decimal.Decimal("1e30"), pa.decimal128(38, 0)),
    lambda: pa.nulls(NUM_ROWS), lambda: array([None], pa.list_(pa.null())), lambda: array({"a": 1}, pa.struct([("a", pa.int8())])),
    lambda: array("x", pa.string()).dictionary_encode(), lambda: array([("k", 1)], pa.map_(pa.string(), pa.int64())),
    lambda: array(2**64 - 1, pa.uint64()),
    lambda: array(datetime.date(1, 1, 1), pa.date64()), lambda: pa.array([f"q{n}" for n in range(NUM_ROWS)]),
    lambda: pa.array(range(NUM_ROWS)),
)  # fmt: skip


def spoilt_jsonl(seed: int) -> bytes:
    hand = Hand(f"jsonl {seed}", values=("{prompt}", ["a", "a"], ["", "b"], [["a"], {}]))
    lines = [json.dumps(row) for row in ROWS]
    if seed % 3 == 0:
        return hand.bytes("\n".join(lines).encode())
    for _ in range(hand.random.choice((1, 1, 3))):
        place = hand.random.randrange(NUM_ROWS)
        lines[place] = hand.json(ROWS[place], JSON_TEXTS)
    return "\n".join(lines).encode()


def spoilt_parquet(seed: int) -> bytes:
    hand, sink = Hand(f"parquet {seed}"), io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    if seed % 2:
        place = hand.random.randrange(table.num_columns)
        table = table.set_column(place, hand.random.choice((table.column_names[place], "prompt")), hand.random.choice(COLUMNS)())
    pq.write_table(table, sink)
    return sink.getvalue() if seed % 2 else hand.bytes(sink.getvalue())


MAKERS = {"task.jsonl": spoilt_jsonl, "task.parquet": spoilt_parquet}


def prepared(path: Path, **changes: Any) -> Prepared:
    given = {"data": str(path), "prompt": "{prompt}", "answer": "{answer}", "max_new_tokens": 4, **changes}
    return prepare_task(TaskSpec.model_validate({**given, "split": {"probe": 2, "select": 3, "test": 4}}), TOKENIZER)


def use(path: Path, seed: int) -> None:
    """Token ids, and what a run writes of them."""
    task = prepared(path, **SPECS[seed % len(SPECS)])
    json.dumps([task.prompts, task.texts], ensure_ascii=False).encode()
    assert all(example.prompt_ids for examples in task.examples.values() for example in examples)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(110))
def test_a_spoilt_task_is_read_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    path = tmp_path / name
    path.write_bytes(MAKERS[name](seed))
    ends_well(lambda: use(path, seed))


@pytest.mark.parametrize("name", MAKERS)
def test_some_are_read_and_some_are_refused(tmp_path: Path, name: str) -> None:
    ends = set()
    for seed in range(40):
        (tmp_path / name).write_bytes(MAKERS[name](seed))
        ends.add(ends_well(lambda: prepared(tmp_path / name)))
    assert ends == {True, False}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"prompt": JSON_VALUES, "answer": JSON_VALUES}), min_size=9, max_size=12))
def test_any_json_is_a_task_or_refused(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends_well(lambda: use(path, 0))


# What the hand has found.


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_half_a_character_is_refused_by_its_row(tmp_path: Path, column: str) -> None:
    """JSON can say it, and nothing that is written in UTF-8 can hold it."""
    rows = [*ROWS[1:], {**ROWS[0], column: "\ud800"}]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=rf"task\.jsonl, row {NUM_ROWS}, `{column}`: column '{column}' is no text .*Mend or remove the row"
    ):
        prepared(path)


def test_a_whole_character_in_two_escapes_is_welcome(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']}\U0001f600"}) + "\n" for row in ROWS))
    assert "\\ud83d" in path.read_text()
    assert prepared(path).texts[0].endswith("\U0001f600")


@pytest.mark.parametrize("what", PYTHON_CANNOT)
def test_a_table_that_holds_what_python_cannot_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "task.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("more", PYTHON_CANNOT[what]()), path)
    with pytest.raises(DataError, match=r"task\.parquet: not a readable Parquet file"):
        prepared(path)
    with pytest.raises(RunError, match=r"task\.parquet: not a readable Parquet file"):
        read_rows(path)


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(DataError, match="no such file"):
        prepared(Path("x" * 300 + ".jsonl"))
