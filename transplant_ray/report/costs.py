"""What a gain costs elsewhere: gain against guard damage, or against the divergence on general text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transplant_ray.report.curves import MOST_VECTOR_POINTS, comparable, merge_path
from transplant_ray.report.look import BASELINES, CLOUD, CONTROLS, INK, PAPER, draw_star, drawing, looks, series
from transplant_ray.report.records import Row, measure_of


@dataclass(frozen=True)
class Cost:
    """Something that a transplant should not do."""

    axis: str
    of: Callable[[Row], float | None]
    """0 where nothing is harmed; None where it was not measured."""


COSTS: Mapping[str, Cost] = MappingProxyType(
    {
        "guards": Cost(
            "lost on the guards, % of the target's", lambda row: None if row.guard_share is None else 100 * (1 - row.guard_share)
        ),
        "kl": Cost("KL(target ‖ variant), nats per token", lambda row: row.kl),
    }
)
POINT_OF = {"source": ">", "all": "<", "target": "o"}


def measured_costs(rows: Sequence[Row]) -> list[str]:
    """Names of the costs that at least one grafted variant has a number for."""
    grafted = [row for row in comparable(rows) if row.role not in ("target", "source")]
    return [name for name, cost in COSTS.items() if any(cost.of(row) is not None for row in grafted)]


def trade_off(rows: Sequence[Row], cost: Cost) -> Figure:
    """Gain over the target on select, in points or nats, against a cost: up and to the left is better.

    Trials in colour, those of a search joined along λ (its front of gain against damage), random sets as a cloud, the
    uniform-alpha curve from the target to all swapped, depth order, baselines black.
    """
    every = comparable(rows)
    measure = measure_of(every)
    target = next((row.score for row in every if row.role == "target"), None) or 0.0
    shown = [row for row in every if cost.of(row) is not None and row.role != "source"]

    def place(row: Row) -> tuple[float, float]:
        return cost.of(row) or 0.0, measure.factor * ((row.score or 0.0) - target)

    with drawing():
        figure = Figure(figsize=(4.9, 3.9), layout="constrained")
        axis = figure.subplots()
        _draw_controls(axis, shown, place)
        _draw_trials(axis, rows, shown, place)
        for row in shown:
            if row.role in BASELINES:
                x, y = place(row)
                axis.plot([x], [y], marker="s", color=INK, markersize=7, linestyle="", zorder=5)
                axis.annotate(BASELINES[row.role][0], (x, y), xytext=(7, -13), textcoords="offset points", color=INK)
        draw_star(axis, [place(row) for row in shown if row.winner])
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xlabel=cost.axis, ylabel=f"gain on select, {measure.unit}")
    return figure


Place = Callable[[Row], tuple[float, float]]


def _draw_trials(axis: Axes, rows: Sequence[Row], shown: Sequence[Row], place: Place) -> None:
    styles = looks(rows)
    points: dict[str, list[Row]] = defaultdict(list)
    for row in shown:
        if row.role == "trial":
            points[series(row)].append(row)
    for name, curve in points.items():
        look = styles[name]
        fitted = sorted((row for row in curve if row.penalty is not None), key=lambda row: row.penalty or 0.0)
        xs, ys = zip(*map(place, fitted or curve), strict=True)
        axis.plot(
            xs, ys, marker=look.marker, linestyle=":" if fitted else "", color=look.colour, markeredgecolor=PAPER, markersize=7,
            linewidth=1.2, label=name, zorder=4,
        )  # fmt: skip
        for row in fitted:
            told = f"λ {row.penalty:g}"
            axis.annotate(told, place(row), xytext=(6, 4), textcoords="offset points", color=look.colour, fontsize=9)


def _draw_controls(axis: Axes, shown: Sequence[Row], place: Place) -> None:
    for ranker in ("random", "depth"):
        points = [place(row) for row in shown if row.role == "control" and row.ranker == ranker]
        if points:
            name, look = CONTROLS[ranker]
            colour = CLOUD if ranker == "random" else look.colour
            marker = "o" if ranker == "random" else look.marker
            axis.plot(
                *zip(*points, strict=True), marker=marker, color=colour, linestyle="", markersize=6, label=name, zorder=2,
                rasterized=len(points) > MOST_VECTOR_POINTS,
            )  # fmt: skip
    merges = merge_path(shown)
    if merges:
        name, look = CONTROLS["uniform"]
        axis.plot(
            *zip(*map(place, merges), strict=True), marker=look.marker, color=look.colour, linewidth=1.4, label=name, zorder=3
        )
