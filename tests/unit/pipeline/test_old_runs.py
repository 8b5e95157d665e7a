"""Runs of before there were losses: their tables have no score, and are read all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from runs import Made, write_run

from transplant_ray.console import results_table
from transplant_ray.pipeline.exporting import make_card_table, read_results

SMALL = Made(rankers=("lae",), kinds=("all",), ks=(1, 4), penalties=(), num_layers=2, num_examples=12)


def test_accuracies_are_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    table = pq.read_table(folder.results)
    pq.write_table(table.drop_columns(["score"]), folder.results)
    rows = read_results(folder)
    assert [row.score for row in rows] == [row.accuracy for row in rows]
    shown = results_table(rows, "select", None)
    assert shown.columns[1].header == "accuracy"
    assert "failed" not in list(shown.columns[1].cells)


def test_a_card_of_losses_has_one_measure_even_where_test_failed(tmp_path: Path) -> None:
    row = read_results(write_run(tmp_path / "run", SMALL))[0]
    kept = replace(row, accuracy=None, score=-1.5, loss=1.5, tir=None)
    failed = replace(row, split="test", accuracy=None, score=None, loss=None, ci_low=None, ci_high=None, error="it died")
    table = make_card_table([kept, failed])
    assert [list(line) for line in table] == [list(table[0])] * 2
    assert [line["loss"] for line in table] == ["1.500", "–"]
