"""The figures of a sweep: accuracy over K, and scores by layer and projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transplant_ray.evaluate.results import Result
from transplant_ray.models.catalogue import Module
from transplant_ray.probe.rankers import Ranking

BASELINES = {
    "target": ("target", "black", ":"),
    "source": ("source", "black", "--"),
    "all": ("all swapped", "black", "-."),
}
CONTROLS = {"random": ("random sets", "o"), "depth": ("depth order", "s")}


def k_curves(results: Sequence[Result]) -> Figure:
    """Accuracy on select over K, one panel a kind: trials in colour with Wilson intervals, controls in grey, baselines as lines."""
    rows = [r for r in results if r.split == "select" and r.accuracy is not None and r.stopped is None]
    kinds = list(dict.fromkeys(r.kind for r in rows if r.role == "trial"))
    figure = Figure(figsize=(4.2 * max(len(kinds), 1) + 1, 4.2), layout="constrained")
    axes = figure.subplots(1, max(len(kinds), 1), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        _controls(axis, [r for r in rows if r.role == "control" and r.kind == kind])
        _trials(axis, [r for r in rows if r.role == "trial" and r.kind == kind])
        _baselines(axis, rows)
        axis.set(title=f"kind: {kind}", xlabel="K, modules transplanted", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"accuracy on select (n = {rows[0].n})" if rows else "accuracy on select")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def heat_map(ranking: Ranking, modules: Sequence[Module]) -> Figure:
    """Scores of one ranker by layer (across) and projection (down), darkest first."""
    projections = list(dict.fromkeys(m.role.projection for m in sorted(modules, key=lambda m: m.role.kind)))
    num_layers = 1 + max(module.layer for module in modules)
    grid = np.full((len(projections), num_layers), np.nan)
    for module in modules:
        grid[projections.index(module.role.projection), module.layer] = ranking.scores[module.name]
    figure = Figure(figsize=(max(5.0, 0.35 * num_layers + 2.5), 0.45 * len(projections) + 1.8), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set(title=f"score by {ranking.ranker}", xlabel="layer", yticks=range(len(projections)), yticklabels=projections)
    figure.colorbar(image, ax=axis, label="score")
    return figure


def _trials(axis: Axes, rows: Iterable[Result]) -> None:
    for index, (name, curve) in enumerate(_curves(rows).items()):
        ks, accuracies = [r.k or 0 for r in curve], [r.accuracy or 0 for r in curve]
        low, high = [r.ci_low or 0 for r in curve], [r.ci_high or 0 for r in curve]
        axis.plot(ks, accuracies, marker="o", color=f"C{index}", label=name, zorder=3)
        axis.fill_between(ks, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        for r in curve:
            if r.winner:
                axis.plot(
                    [r.k or 0],
                    [r.accuracy or 0],
                    marker="*",
                    markersize=16,
                    color="crimson",
                    linestyle="",
                    label="winner",
                    zorder=4,
                )


def _controls(axis: Axes, rows: Sequence[Result]) -> None:
    for ranker, (label, marker) in CONTROLS.items():
        points = [(r.k or 0, r.accuracy or 0) for r in rows if r.ranker == ranker]
        if points:
            axis.plot(*zip(*points, strict=True), marker=marker, color="0.55", linestyle="", markersize=4, label=label)


def _baselines(axis: Axes, rows: Iterable[Result]) -> None:
    for r in rows:
        if r.role in BASELINES:
            label, colour, style = BASELINES[r.role]
            axis.axhline(r.accuracy or 0, color=colour, linestyle=style, linewidth=1, label=label)


def _curves(rows: Iterable[Result]) -> Mapping[str, list[Result]]:
    curves: dict[str, list[Result]] = {}
    for row in rows:
        name = row.ranker or "" if row.alpha in (None, 1.0) else f"{row.ranker} alpha={row.alpha:g}"
        curves.setdefault(name, []).append(row)
    return {name: sorted(curve, key=lambda r: r.k or 0) for name, curve in curves.items()}
