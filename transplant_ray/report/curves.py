"""Accuracy curves: over K and over the share of ‖ΔW‖ that is moved, one panel a kind; and the headline as one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log2

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from transplant_ray.report.look import (
    BASELINES,
    CONTROL,
    CONTROLS,
    GRID,
    INK,
    PAPER,
    WINNER_COLOUR,
    Look,
    draw_star,
    drawing,
    looks,
    series,
)
from transplant_ray.report.records import ACCURACY, LOSS, Row, measure_of

PANEL = (4.5, 3.5)
"""Inches; a page shows 72 of them as 324 points, which a phone is wide."""
MIN_TICK_ROOM = 0.06
"""Of the width, between two ticks of K."""
MOST_VECTOR_POINTS = 1000
"""More of them are pixels: a page of a hundred thousand marks would not scroll."""

Across = Callable[[Row], float | None]
"""Where on the x axis a variant stands; None where it does not."""


def over_k(row: Row) -> float | None:
    return row.size


def over_moved(row: Row) -> float | None:
    return row.moved


def comparable(rows: Iterable[Row]) -> list[Row]:
    """Rows on select that can stand in one figure: all examples answered."""
    return [row for row in rows if row.split == "select" and row.measured]


def kinds(rows: Iterable[Row]) -> list[str]:
    """Kinds of the trials, in the order of the plan."""
    return list(dict.fromkeys(row.panel for row in rows if row.role == "trial"))


def k_curves(rows: Sequence[Row]) -> Figure:
    """Score on select over K, one panel a kind: trials in colour with their intervals, controls in grey, baselines as lines."""
    shown = comparable(rows)
    names = kinds(shown) or [""]
    with drawing():
        figure = Figure(figsize=(4.2 * len(names) + 1, 4.2), layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, kind in zip(axes, names, strict=True):
            _draw(axis, rows, kind, over_k)
        axes[0].set_ylabel(f"{measure_of(rows).axis} on select{f' (n = {shown[0].n})' if shown else ''}")
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def curve_panel(rows: Sequence[Row], kind: str, across: Across) -> Figure:
    """One kind by itself, without a legend; limits of both axes are those of all kinds."""
    with drawing():
        figure = Figure(figsize=PANEL, layout="constrained")
        axis = figure.subplots()
        _draw(axis, rows, kind, across)
        axis.set_ylabel(f"{measure_of(rows).axis} on select")
    return figure


def headline(rows: Sequence[Row]) -> Figure:
    """Target, winner, all swapped and source on one line of accuracy or loss, with their intervals."""
    measure = measure_of(rows)
    most = 1.0 if measure is ACCURACY else max(end for row in rows for end in (row.ci_high, row.value) if end is not None)
    with drawing():
        figure = Figure(figsize=(4.9, 0.42 * len(rows) + 0.75), layout="constrained")
        axis = figure.subplots()
        for place, row in enumerate(rows):
            colour, value = WINNER_COLOUR if row.winner else CONTROL, row.value or 0
            axis.plot(
                [value if end is None else end for end in (row.ci_low, row.ci_high)],
                [place, place],
                color=colour,
                lw=11,
                alpha=0.4,
                solid_capstyle="butt",
            )
            axis.plot([value, value], [place - 0.3, place + 0.3], color=WINNER_COLOUR if row.winner else INK, lw=2.4)
            axis.annotate(
                f"{value:.3f}",
                (1.05 * most, place),
                va="center",
                annotation_clip=False,
                fontweight="bold" if row.winner else "normal",
            )
        axis.set_yticks(range(len(rows)), ["winner" if row.winner else BASELINES[row.role][0] for row in rows])
        axis.set(
            ylim=(len(rows) - 0.4, -0.6), xlim=(0, 1.005 * most), xlabel=f"{measure.axis} on {rows[0].split} (n = {rows[0].n})"
        )
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
    return figure


def _draw(axis: Axes, rows: Sequence[Row], kind: str, across: Across) -> None:
    every = comparable(rows)
    shown = [row for row in every if across(row) is not None]
    of_kind = [row for row in shown if row.panel == kind]
    _draw_baselines(axis, every)
    _draw_controls(axis, [row for row in of_kind if row.role == "control"], across)
    if across is over_moved:
        _draw_merges(axis, shown, across)
    trials = [row for row in of_kind if row.role == "trial"]
    _draw_trials(axis, trials, looks(rows), across)
    draw_star(axis, [(across(row) or 0, row.value or 0) for row in trials if row.winner])
    axis.set(title=f"kind: {kind}", ylim=_limits(every))
    if across is over_k:
        grid = [row for row in shown if row.role in ("trial", "control") and row.ranker != "uniform"]
        _scale_k(axis, [row.size for row in grid], [row.size for row in grid if row.panel == kind])
    else:
        axis.set(xlim=(-0.02, 1.02 * max(1.0, *(across(row) or 0 for row in of_kind), 0.0)), xlabel="share of ‖ΔW‖ that is moved")


def _draw_trials(axis: Axes, rows: Iterable[Row], styles: Mapping[str, Look], across: Across) -> None:
    """Top-K sets are a curve; what was fitted or grown is points, for nothing lies between two of them."""
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        curves[series(row)].append(row)
    for name, unsorted in curves.items():
        curve = sorted(unsorted, key=lambda row: across(row) or 0)
        xs, ys, low, high = _columns(curve, across)
        look = styles[name]
        if any(row.k is None for row in curve):
            down, up = ([y - end for y, end in zip(ys, low, strict=True)], [end - y for y, end in zip(ys, high, strict=True)])
            axis.errorbar(xs, ys, yerr=[down, up], fmt=look.marker, color=look.colour, elinewidth=1.2, label=name, zorder=4)
            continue
        axis.fill_between(xs, low, high, color=look.colour, alpha=0.13, linewidth=0)
        axis.plot(
            xs, ys, marker=look.marker, color=look.colour, linestyle=look.line, markeredgecolor=PAPER, label=name, zorder=4
        )  # fmt: skip


def _draw_controls(axis: Axes, rows: Sequence[Row], across: Across) -> None:
    """Random sets as points, those of the grid with the range of their seeds behind; depth order as a curve."""
    drawn = [row for row in rows if row.ranker == "random" and row.k is not None]
    by_size: dict[int, list[Row]] = defaultdict(list)
    for row in drawn:
        by_size[row.size].append(row)
    if drawn and across is over_k:
        sizes = sorted(by_size)
        ranges = [[row.value or 0 for row in by_size[size]] for size in sizes]
        axis.fill_between(sizes, list(map(min, ranges)), list(map(max, ranges)), color=GRID, linewidth=0, zorder=1)
        axis.plot(sizes, [sum(r) / len(r) for r in ranges], color=CONTROL, linewidth=1.2, zorder=2)
    for ranker in ("random", "depth"):
        points = sorted((row for row in rows if row.ranker == ranker), key=lambda row: across(row) or 0)
        if points:
            name, look = CONTROLS[ranker]
            xs, ys, _, _ = _columns(points, across)
            line = look.line if ranker == "depth" else ""
            axis.plot(
                xs, ys, marker=look.marker, color=look.colour, linestyle=line, linewidth=1.2, markersize=5, label=name, zorder=3,
                rasterized=len(xs) > MOST_VECTOR_POINTS,
            )  # fmt: skip


def merge_path(rows: Iterable[Row]) -> list[Row]:
    """Plain merges from the target to all swapped, by their coefficient; empty where there is none between the two."""
    at = {"target": 0.0, "all": 1.0}
    found = [(row.alpha or 0.0 if row.ranker == "uniform" else at.get(row.role), row) for row in rows]
    path = sorted(((alpha, row) for alpha, row in found if alpha is not None), key=lambda entry: entry[0])
    return [row for _, row in path] if any(row.ranker == "uniform" for _, row in path) else []


def _draw_merges(axis: Axes, rows: Iterable[Row], across: Across) -> None:
    """What a plain merge reaches with the same share of ‖ΔW‖."""
    curve = merge_path(rows)
    if curve:
        name, look = CONTROLS["uniform"]
        xs, ys, _, _ = _columns(curve, across)
        axis.plot(xs, ys, marker=look.marker, color=look.colour, linestyle=look.line, linewidth=1.2, label=name, zorder=3)


def _draw_baselines(axis: Axes, rows: Iterable[Row]) -> None:
    for row in rows:
        if row.role in BASELINES:
            name, look = BASELINES[row.role]
            axis.axhline(row.value or 0, color=look.colour, linestyle=look.line, linewidth=1, label=name, zorder=2)


def _scale_k(axis: Axes, sizes: Sequence[int], of_kind: Sequence[int]) -> None:
    """The same for all kinds, logarithmic where K spans a decade or so; the K of this kind as ticks, where there is room."""
    axis.set_xlabel("K, modules transplanted")
    if not sizes:
        return
    low, high = min(sizes), max(sizes)
    logarithmic = low > 0 and high >= 8 * low  # gates may all be rounded to 0, which a logarithm cannot show
    if logarithmic:
        axis.set_xscale("log", base=2)
        axis.set_xlim(low / 1.25, high * 1.25)
    place = log2 if logarithmic else float
    room = MIN_TICK_ROOM * (place(high) - place(low))
    ticks: list[int] = []
    for size in sorted(set(of_kind)):
        if not ticks or place(size) - place(ticks[-1]) >= room:
            ticks.append(size)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Of the score: all points and intervals of all kinds with some air."""
    ends = [end for row in rows for end in (row.ci_low, row.ci_high, row.value) if end is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    air = max(0.04 * (high - low), 0.01)
    return max(low - air, -0.02), high + air if measure_of(rows) is LOSS else min(high + air, 1.02)


def _columns(rows: Sequence[Row], across: Across) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, accuracy or loss, low and high end of its interval; the value itself where there is no interval."""
    xs = [float(across(row) or 0) for row in rows]
    ys = [row.value or 0.0 for row in rows]
    low = [y if row.ci_low is None else row.ci_low for row, y in zip(rows, ys, strict=True)]
    high = [y if row.ci_high is None else row.ci_high for row, y in zip(rows, ys, strict=True)]
    return xs, ys, low, high
