"""Figures of a comparison: what methods reach and what it costs elsewhere, learning rates, positions of organs. A panel a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from transplant_ray.report.look import COLOURS, GRID, INK, MARKERS, PAPER, Look, drawing

LOOKS: Mapping[str, Look] = {
    method: Look(COLOURS[place], MARKERS[place]) for place, method in enumerate(("organ", "lora", "full", "in_place"))
}
NAMES: Mapping[str, str] = {"organ": "organ", "lora": "LoRA", "full": "full fine-tuning", "in_place": "layers in place"}
PANEL = (4.6, 3.7)
AIR = 0.08
"""Of the range, beyond the outermost point."""
Said = Mapping[str, Any]


def trade(summary: Said, model: str) -> Figure:
    """Perplexity on domain text against that on general text: seeds as points, intervals of the means as bars."""
    with drawing():
        figure = Figure(figsize=PANEL, layout="constrained")
        axis = figure.subplots()
        before = _before(summary, model)
        axis.plot(before["domain"], before["general"], marker="P", markersize=10, color=INK, linestyle="", zorder=5)
        seen = [(before["domain"], before["general"])]
        for standing in _of(summary["standings"], model):
            look = LOOKS[standing["method"]]
            points = [
                (learnt["test"]["domain"], learnt["test"]["general"])
                for learnt in _of(summary["learnt"], model)
                if learnt["method"] == standing["method"] and learnt["stage"] == "confirm" and learnt["error"] is None
            ]
            seen += points
            axis.plot(*zip(*points, strict=True), marker=look.marker, color=look.colour, alpha=0.45, linestyle="", zorder=3)
            _bars(axis, standing, look)
        _perplexity_axis(axis, "x", [x for x, _ in seen])
        _perplexity_axis(axis, "y", [y for _, y in seen])
        axis.set(title=model, xlabel="perplexity on domain text, test", ylabel="perplexity on general text, test")
    return figure


def rates(summary: Said, model: str) -> Figure:
    """Perplexity on select over the learning rate; the one that was chosen is large, and a failed training a cross at the top."""
    with drawing():
        figure = Figure(figsize=PANEL, layout="constrained")
        axis = figure.subplots()
        known: list[float] = []
        failed: list[tuple[float, Look]] = []
        for choice in _of(summary["choices"], model):
            look = LOOKS[choice["method"]]
            points = [(rate["lr"], rate["loss"]) for rate in choice["rates"] if rate["loss"] is not None]
            known += [loss for _, loss in points]
            failed += [(rate["lr"], look) for rate in choice["rates"] if rate["loss"] is None]
            axis.plot(
                [lr for lr, _ in points], [loss for _, loss in points], marker=look.marker, color=look.colour,
                markeredgecolor=PAPER, zorder=3,
            )  # fmt: skip
            chosen = [point for point in points if point[0] == choice["lr"]]
            for lr, loss in chosen:
                axis.plot([lr], [loss], marker=look.marker, color=look.colour, markersize=12, markeredgecolor=INK, zorder=4)
        _perplexity_axis(axis, "y", known or [0.0])
        for lr, look in failed:
            axis.plot([lr], [0.97], marker="x", color=look.colour, markeredgewidth=2, transform=axis.get_xaxis_transform())
        axis.set_xscale("log")
        grid = sorted({rate["lr"] for choice in _of(summary["choices"], model) for rate in choice["rates"]})
        axis.set_xticks(grid, [f"{lr:g}" for lr in grid])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(title=model, xlabel="learning rate", ylabel="perplexity on domain text, select")
    return figure


def positions(summary: Said, model: str, mode: str) -> Figure | None:
    """Perplexity on select at every position of an organ: each seed thin, the mean thick; None where there was no organ."""
    curves = [
        [(site["at"], site["loss"]) for site in learnt["sites"] if site["mode"] == mode and site["loss"] is not None]
        for learnt in _of(summary["learnt"], model)
        if learnt["method"] == "organ" and learnt["stage"] == "confirm" and learnt["error"] is None
    ]
    curves = [sorted(curve) for curve in curves if curve]
    if not curves:
        return None
    with drawing():
        figure = Figure(figsize=PANEL, layout="constrained")
        axis = figure.subplots()
        colour = LOOKS["organ"].colour
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1, alpha=0.45, zorder=3)
        places = sorted({at for curve in curves for at, _ in curve})
        means = [fmean(loss for curve in curves for at, loss in curve if at == place) for place in places]
        axis.plot(places, means, marker="o", color=colour, markeredgecolor=PAPER, zorder=4)
        half = len(places) // 2
        for first, last in ((0, half - 1), (len(places) - half, len(places) - 1)):
            if half:
                axis.axvspan(places[first] - 0.4, places[last] + 0.4, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        before = _before(summary, model, "select")["domain"]
        axis.axhline(before, color=INK, linestyle=":", linewidth=1.2, zorder=2)
        _perplexity_axis(axis, "y", [before, *(loss for curve in curves for _, loss in curve)])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(title=f"{model}: {mode}", xlabel="position", ylabel="perplexity on domain text, select")
    return figure


def swatch(method: str) -> Figure:
    """The sign of a method in a legend; `before` is the recipient as it is."""
    look = LOOKS.get(method, Look(INK, "P"))
    figure = Figure(figsize=(0.4, 0.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.plot([0], [0], marker=look.marker, color=look.colour, markersize=7, linestyle="")
    return figure


def _bars(axis: Axes, standing: Said, look: Look) -> None:
    """The mean over the seeds with its interval, both ways."""
    x, y = (standing["loss"][text] for text in ("domain", "general"))
    reach = [standing["interval"][text] for text in ("domain", "general")]
    ends = [None if ends is None else [[middle - ends[0]], [ends[1] - middle]] for middle, ends in zip((x, y), reach, strict=True)]
    axis.errorbar(
        [x], [y], xerr=ends[0], yerr=ends[1], fmt=look.marker, color=look.colour, markersize=9, markeredgecolor=INK,
        elinewidth=1.4, capsize=3, zorder=4,
    )  # fmt: skip


def _perplexity_axis(axis: Axes, which: str, losses: Sequence[float]) -> None:
    """Even in losses, labelled with perplexities: a logarithmic axis. Bars that reach further are cut off at the edge."""
    low, high = min(losses), max(losses)
    air = max(AIR * (high - low), 0.02)
    span = (low - air, high + air)
    ends = [exp(min(700.0, max(-700.0, end))) for end in span]  # what has all but diverged has losses beyond that, and no labels
    ticks = [loss for loss in map(log, _round_numbers(*ends)) if span[0] <= loss <= span[1]]
    side = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xlim if which == "x" else axis.set_ylim)(*span)
    side.set_ticks(ticks)
    side.set_major_formatter(FuncFormatter(lambda loss, _: f"{exp(loss):.4g}"))


def _round_numbers(low: float, high: float) -> list[float]:
    """Four to eight numbers between the two that are easy to read."""
    if high / low < 4:
        found = MaxNLocator(5).tick_values(low, high)
        return [float(value) for value in found if value > 0]
    found = [digit * 10.0**power for power in range(-3, 305) for digit in (1, 2, 5)]
    inside = [value for value in found if low <= value <= high]
    return inside[:: 1 + len(inside) // 8]


def _before(summary: Said, model: str, side: str = "test") -> Mapping[str, float]:
    said = next(learnt for learnt in _of(summary["learnt"], model) if learnt["method"] == "before")
    return {"domain": said["select"]} if side == "select" else said["test"]


def _of(rows: Iterable[Said], model: str) -> list[Said]:
    return [row for row in rows if row["model"] == model]
