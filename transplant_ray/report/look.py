"""How the report looks: colours that colour-blind readers can tell apart and that survive a grey print, one look per curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from transplant_ray.report.records import Row

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#dfe3e8", "#ffffff"
CONTROL, CLOUD = "#8b949e", "#c3c9d0"
STAR = "#111111"
WINNER_COLOUR = "#0072b2"
STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 11.0,
        "axes.titlesize": 12.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": MUTED,
        "axes.edgecolor": CONTROL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "lines.linewidth": 1.8,
        "lines.markersize": 6.0,
        "text.parse_math": False,  # a label is a label, whatever dollars it has
    }
)


def drawing() -> AbstractContextManager[None]:
    """Figures that are made inside have this look."""
    return matplotlib.rc_context(dict(STYLE))


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str = ""
    line: str = "-"


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9", "#6b4c9a")
"""Okabe and Ito 2008; the reddish purple darker, the yellow and the black replaced, for they are lost on paper and in the axes."""
MARKERS = ("o", "^", "D", "v", "P", "X", "h")
RANDOM, DEPTH, UNIFORM = Look(CONTROL, "."), Look(CONTROL, "s", "--"), Look(MUTED, "d", "-")
CONTROLS: Mapping[str, tuple[str, Look]] = MappingProxyType(
    {"random": ("random sets", RANDOM), "depth": ("depth order", DEPTH), "uniform": ("uniform alpha", UNIFORM)}
)
BASELINES: Mapping[str, tuple[str, Look]] = MappingProxyType(
    {
        "target": ("target", Look(INK, line=":")),
        "source": ("source", Look(INK, line="--")),
        "all": ("all swapped", Look(INK, line="-.")),
    }
)
WINNER = Look(STAR, "*", "")


def series(row: Row) -> str:
    """The curve that a trial is on: its ranker, and what else of the grid is fixed along it."""
    parts = [row.ranker or "trial"]
    if row.alpha not in (None, 1.0):
        parts.append(f"alpha={row.alpha:g}")
    if row.channels is not None and row.channels != 1:
        parts.append(f"channels={row.channels:g}")
    return " ".join(parts)


def looks(rows: Iterable[Row]) -> dict[str, Look]:
    """One look per curve of the trials, in the order of the plan, the same in every figure."""
    names = dict.fromkeys(series(row) for row in rows if row.role == "trial")
    lines = ("-", "--", ":")
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], lines[i // len(COLOURS) % len(lines)])
        for i, name in enumerate(names)
    }


def draw_star(axis: Axes, points: Iterable[tuple[float, float]]) -> None:
    """The winner, above everything else."""
    for x, y in points:
        axis.plot([x], [y], marker="*", markersize=17, color=STAR, markeredgecolor=PAPER, linestyle="", label="winner", zorder=6)
