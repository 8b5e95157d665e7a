"""Rows of a run's tables: checked at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Made, result_rows

from transplant_ray.errors import RunError
from transplant_ray.report.records import Row, Score, read_records, with_label

RAW = result_rows(Made(rankers=("lae",), kinds=("ffn",), ks=(4,), penalties=(0.5,)))


def read(**changed: object) -> Row:
    raw = {**next(row for row in RAW if row["ranker"] == "lae"), **changed}
    return read_records(Row, [with_label(raw)], Path("results.parquet"))[0]


def test_a_row_has_the_label_that_the_sweep_gave_it() -> None:
    labels = {with_label(row)["label"] for row in RAW}
    assert {"target", "source", "all swapped", "lae ffn k=4", "depth ffn k=4", "random ffn k=4 seed=1"} <= labels


def test_what_is_not_there_or_no_number_is_none() -> None:
    assert read(accuracy=float("nan"), moved=float("nan")).accuracy is None
    raw = {name: RAW[0][name] for name in ("variant", "role", "split", "n", "accuracy")}
    row = read_records(Row, [with_label(raw)], Path("results.parquet"))[0]
    assert (row.label, row.moved, row.kl, row.guard_share, row.penalty, row.winner) == ("target", None, None, None, None, False)


def test_whole_numbers_that_became_fractions_in_a_data_frame_are_read() -> None:
    assert read(k=4.0).k == 4


def test_a_variant_that_is_no_top_k_set_is_as_large_as_its_modules() -> None:
    assert read().size == 4
    assert read(k=None, num_modules=17).size == 17
    assert read(kind=None).panel == "all"


@pytest.mark.parametrize("changed", [{"stopped": "raced"}, {"accuracy": None, "error": "broken"}, {"accuracy": None}])
def test_what_did_not_answer_everything_cannot_be_compared(changed: dict[str, object]) -> None:
    assert read().measured
    assert not read(**changed).measured


@pytest.mark.parametrize(
    ("changed", "column"),
    [({"accuracy": "high"}, "accuracy"), ({"role": "king"}, "role"), ({"n": None}, "n"), ({"split": 3}, "split")],
)
def test_a_damaged_column_is_named(changed: dict[str, object], column: str) -> None:
    with pytest.raises(RunError, match=f"results.parquet: column '{column}': .* Run the sweep again"):
        read(**changed)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RunError, match=r"rankings\.parquet: column 'layer': Field required"):
        read_records(
            Score,
            [{"ranker": "lae", "rank": 1, "module": "m", "kind": "ffn", "projection": "up", "score": 1.0}],
            Path("rankings.parquet"),
        )


def test_one_that_failed_at_a_guard_alone_is_comparable_on_the_task() -> None:
    assert read(error="guard facts: NumericsError: NaN logits").measured
