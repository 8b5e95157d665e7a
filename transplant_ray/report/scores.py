"""Where a ranker's scores are: by layer and projection, and against depth; and what the winner changed, on the same grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transplant_ray.report.look import COLOURS, GRID, INK, MARKERS, Look, drawing
from transplant_ray.report.records import Score

SEQUENTIAL, DIVERGING = "YlGnBu", "PuOr"
"""Both keep their order for colour-blind readers and in grey, the second by its distance from white."""
KIND_LOOKS: Mapping[str, Look] = {"attn": Look(COLOURS[0], MARKERS[0]), "ffn": Look(COLOURS[1], MARKERS[1])}


def heat_map(scores: Sequence[Score], marked: Collection[str] = ()) -> Figure:
    """Scores of one ranker by layer (across) and projection (down); a dot on the modules that are `marked`.

    Two-sided colours around 0 where some scores are below it. Cells without a compatible module are grey.
    """
    ranker = scores[0].ranker
    values = {score.module: score.score for score in scores}
    signed = min(values.values()) < 0 < max(values.values())
    with drawing():
        figure, axis = _grid_figure(scores)
        image = _draw_grid(axis, scores, values, DIVERGING if signed else SEQUENTIAL, CenteredNorm() if signed else None)
        for score in scores:
            if score.module in marked:
                axis.plot(
                    [score.layer], [_projections(scores).index(score.projection)], ".", color="white", markeredgecolor=INK, ms=9
                )
        axis.set_title(f"score by {ranker}")
        bar = figure.colorbar(image, ax=axis, pad=0.02, aspect=12)
        bar.outline.set_visible(False)
    return figure


def changed_map(scores: Sequence[Score], coefficients: Mapping[str, Any]) -> Figure:
    """The winner's coefficient of every module, 0 the target's weight and 1 the source's; a mean where channels have their own."""
    values = {score.module: float(np.mean(coefficients.get(score.module, 0.0))) for score in scores}
    with drawing():
        figure, axis = _grid_figure(scores)
        outside = min(values.values()) < 0 or max(values.values()) > 1
        colours, norm = (DIVERGING, CenteredNorm()) if outside else ("Blues", Normalize(0, 1.3))
        _draw_grid(axis, scores, values, colours, norm).set_edgecolor(GRID)
        for score in scores:
            value = values[score.module]
            if value not in (0, 1) and len(scores) <= MOST_NUMBERED:
                place = (score.layer, _projections(scores).index(score.projection))
                axis.annotate(f"{value:.2g}", place, ha="center", va="center", fontsize=8)
    return figure


MOST_NUMBERED = 120


def depth_panel(scores: Sequence[Score]) -> Figure:
    """Score over layer, kinds apart: what is left of a ranking once depth is known."""
    with drawing():
        figure = Figure(figsize=(4.5, 2.7), layout="constrained")
        axis = figure.subplots()
        kinds = sorted({score.kind for score in scores})
        for place, kind in enumerate(kinds):
            points = [score for score in scores if score.kind == kind]
            look, aside = KIND_LOOKS.get(kind, Look(COLOURS[2], MARKERS[2])), 0.2 * (place - (len(kinds) - 1) / 2)
            axis.plot(
                [p.layer + aside for p in points], [p.score for p in points], look.marker, color=look.colour, alpha=0.8, label=kind
            )  # fmt: skip
        axis.set(title=f"{scores[0].ranker} against depth", xlabel="layer", ylabel="score")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axis.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.02, -0.1), ncols=3, handletextpad=0, columnspacing=0.8)
    return figure


def _projections(scores: Sequence[Score]) -> list[str]:
    """Attention first, then feed-forward, each in the order of the alphabet."""
    return list(dict.fromkeys(score.projection for score in sorted(scores, key=lambda score: (score.kind, score.projection))))


def _grid_figure(scores: Sequence[Score]) -> tuple[Figure, Axes]:
    num_layers = 1 + max(score.layer for score in scores)
    figure = Figure(figsize=(max(4.9, 0.2 * num_layers + 1.8), 0.3 * len(_projections(scores)) + 1.15), layout="constrained")
    return figure, figure.subplots()


def _draw_grid(axis: Axes, scores: Sequence[Score], values: Mapping[str, float], colours: str, norm: Normalize | None) -> Any:
    """Cells by layer and projection; where several modules share one, as experts do, their mean."""
    projections, num_layers = _projections(scores), 1 + max(score.layer for score in scores)
    total_PL, count_PL = np.zeros((2, len(projections), num_layers))
    for score in scores:
        place = projections.index(score.projection), score.layer
        total_PL[place] += values[score.module]
        count_PL[place] += 1
    mean_PL = np.ma.masked_where(count_PL == 0, total_PL / np.maximum(count_PL, 1))
    across, down = (np.arange(size + 1) - 0.5 for size in (num_layers, len(projections)))
    image = axis.pcolormesh(across, down, mean_PL, cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_facecolor(GRID)
    axis.grid(visible=False)
    axis.set(xlabel="layer", yticks=range(len(projections)), yticklabels=projections)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image
