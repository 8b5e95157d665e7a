"""Curves carry every trial, controls and baselines, in sweeps of any shape."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from runs import Made, Row, result_rows

from transplant_ray.report.curves import Across, comparable, curve_panel, headline, k_curves, kinds, over_k, over_moved
from transplant_ray.report.look import looks, series
from transplant_ray.report.records import Row as Read
from transplant_ray.report.records import read_records, with_label

MADE = Made(rankers=("lae", "channel"), ks=(1, 2, 8), penalties=(0.0, 1.0), num_examples=50)


def read(made: Made = MADE, rows: list[Row] | None = None) -> list[Read]:
    return read_records(Read, [with_label(made.change(row)) for row in rows or result_rows(made)], Path("results.parquet"))


def points(figure: Figure, name: str) -> list[set[tuple[float, float]]]:
    """What is drawn under a name, by axis."""
    found = []
    for axis in figure.axes:
        lines = [line for line in axis.lines if line.get_label() == name]
        lines += [bar[0] for bar in axis.containers if bar.get_label() == name]
        found.append({(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)})
    return found


@pytest.mark.parametrize("across", [over_k, over_moved])
def test_every_trial_is_a_point_of_its_curve_in_the_panel_of_its_kind(across: Across) -> None:
    rows = read()
    for kind in kinds(rows):
        figure = curve_panel(rows, kind, across)
        trials = [row for row in comparable(rows) if row.role == "trial" and row.panel == kind]
        assert trials
        for name in {series(row) for row in trials}:
            assert points(figure, name) == [{(across(row), row.accuracy) for row in trials if series(row) == name}]


def test_the_figure_for_mlflow_has_one_panel_a_kind_and_all_of_them() -> None:
    rows = read()
    figure = k_curves(rows)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["kind: attn", "kind: ffn", "kind: all"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"lae", "channel", "gates", "random sets", "depth order", "target", "source", "all swapped", "winner"}
    found = points(figure, "lae")
    for kind, drawn in zip(kinds(rows), found, strict=True):
        assert drawn == {(row.k, row.accuracy) for row in comparable(rows) if row.ranker == "lae" and row.kind == kind}


def test_controls_are_grey_and_all_there() -> None:
    rows = read()
    figure = curve_panel(rows, "ffn", over_k)
    for ranker, name in (("random", "random sets"), ("depth", "depth order")):
        expected = {(row.k, row.accuracy) for row in rows if row.ranker == ranker and row.kind == "ffn"}
        assert points(figure, name) == [expected]
        (line,) = [line for line in figure.axes[0].lines if line.get_label() == name]
        red, green, blue = (int(line.get_color()[i : i + 2], 16) for i in (1, 3, 5))
        assert max(red, green, blue) - min(red, green, blue) < 32


def test_plain_merges_are_drawn_over_the_share_that_is_moved_and_not_over_k() -> None:
    rows = read()
    merges = {(row.moved, row.accuracy) for row in comparable(rows) if row.ranker == "uniform" or row.role in ("target", "all")}
    assert points(curve_panel(rows, "attn", over_moved), "uniform alpha") == [merges]
    assert points(curve_panel(rows, "attn", over_k), "uniform alpha") == [set()]


def test_what_was_not_evaluated_on_all_examples_is_no_point() -> None:
    rows = [row.model_copy(update={"stopped": "raced"}) if row.k == 2 else row for row in read()]
    assert {x for drawn in points(k_curves(rows), "lae") for x, _ in drawn} == {1.0, 8.0}


def test_alphas_channels_and_rankers_are_curves_of_their_own() -> None:
    row = next(row for row in read() if row.ranker == "lae")
    changed = [row, *(row.model_copy(update=update) for update in ({"alpha": 0.5}, {"channels": 0.25}, {"ranker": "other"}))]
    assert list(looks(changed)) == ["lae", "lae alpha=0.5", "lae channels=0.25", "other"]
    assert len({(look.colour, look.marker, look.line) for look in looks(changed).values()}) == 4


def test_twenty_curves_have_twenty_looks() -> None:
    row = next(row for row in read() if row.role == "trial")
    many = looks([row.model_copy(update={"ranker": f"ranker {i}"}) for i in range(20)])
    assert len({(look.colour, look.marker, look.line) for look in many.values()}) == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "accuracy": None, "error": "broken"},
        lambda row: {**row, "accuracy": None, "error": "broken"} if row["role"] == "trial" else row,
        lambda row: {**row, "ci_low": None, "ci_high": None, "tir": None},
        lambda row: {**row, "kind": None, "k": None, "num_modules": 0} if row["role"] == "trial" else row,
        lambda row: {**row, "moved": None},
        lambda row: {**row, "accuracy": 0.5, "ci_low": 0.5, "ci_high": 0.5},
    ],
    ids=["all failed", "trials failed", "no intervals", "no modules", "not measured", "all equal"],
)
def test_sweeps_that_went_badly_still_draw(change) -> None:  # type: ignore[no-untyped-def]
    rows = read(dataclasses.replace(MADE, change=change))
    for figure in (k_curves(rows), curve_panel(rows, "all", over_moved)):
        png = io.BytesIO()
        figure.savefig(png, format="png")
        assert png.getvalue()


def test_the_headline_has_a_line_for_every_row_with_its_interval() -> None:
    rows = [row for row in read() if row.split == "test"]
    figure = headline(rows)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["target", "source", "all swapped", "winner"]
    spans = [tuple(line.get_xdata()) for line in axis.lines][::2]
    assert spans == [(row.ci_low, row.ci_high) for row in rows]
    assert [text.get_text() for text in axis.texts] == [f"{row.accuracy:.3f}" for row in rows]
