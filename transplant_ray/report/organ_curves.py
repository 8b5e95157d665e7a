"""The position curve: perplexity over the place of an organ, on the text that it is for and on other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.evaluate.organ_results import OrganResult
from transplant_ray.report.look import COLOURS, CONTROL, INK, MARKERS, PAPER, Look, draw_star, drawing

PANEL = (5.2, 3.9)
WIDE_RANGE = 20.0
"""Times the smallest perplexity, from which on the axis is logarithmic."""
MOST_TICKS = 16
RECIPIENT = ("recipient", Look(INK, line=":"))
MODE_LINES: Mapping[str, str] = {"insert": "-", "replace": "--"}
Curve = tuple[str, str]
"""Organ and mode."""


def drawable(rows: Sequence[OrganResult], text: str) -> list[OrganResult]:
    """Rows on select that are points or lines of the figure of a text."""
    return [row for row in rows if row.split == "select" and row.error is None and value_of(row, text) is not None]


def value_of(row: OrganResult, text: str) -> float | None:
    found: float | None = getattr(row, f"{text}_perplexity")
    return found


def ends_of(row: OrganResult, text: str) -> tuple[float, float] | None:
    """The interval of the mean loss, as perplexities."""
    low, high = (getattr(row, f"{text}_ci_{end}") for end in ("low", "high"))
    ends = (None, None) if low is None or high is None else (perplexity(low), perplexity(high))
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def curve_looks(rows: Sequence[OrganResult]) -> dict[Curve, Look]:
    """A colour for every organ and a line for every mode, the same in both panels."""
    organs = list(dict.fromkeys(row.organ for row in rows if row.role == "trial"))
    curves = dict.fromkeys((str(row.organ), str(row.mode)) for row in rows if row.role == "trial")
    return {
        (organ, mode): Look(
            COLOURS[organs.index(organ) % len(COLOURS)], _marker(organs.index(organ), mode), MODE_LINES.get(mode, "-")
        )
        for organ, mode in curves
    }


def control_look(look: Look) -> Look:
    return replace(look, colour=CONTROL)


def position_panel(rows: Sequence[OrganResult], text: str, figure: Figure | None = None, axis: Axes | None = None) -> Figure:
    """One text: trials in colour with their intervals, untrained controls in grey, the recipient as a line with its interval."""
    with drawing():
        figure = figure or Figure(figsize=PANEL, layout="constrained")
        axis = axis or figure.subplots()
        shown = drawable(rows, text)
        looks = curve_looks(rows)
        for row in (row for row in shown if row.role == "recipient"):
            _draw_recipient(axis, row, text)
        for role in ("untrained", "trial"):
            for curve, look in looks.items():
                points = [row for row in shown if row.role == role and (row.organ, row.mode) == curve]
                _draw_curve(axis, points, text, look if role == "trial" else control_look(look), trained=role == "trial")
        draw_star(axis, [(float(row.at or 0), value_of(row, text) or 0.0) for row in shown if row.winner])
        _scale(axis, shown, text)
        axis.set(title=f"{text} text", xlabel="position: layer of the recipient", ylabel="perplexity on select")
    return figure


def position_curves(rows: Sequence[OrganResult]) -> Figure:
    """Both texts with a legend, for MLflow."""
    with drawing():
        figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.8), layout="constrained")
        for axis, text in zip(figure.subplots(1, 2), ("domain", "general"), strict=True):
            position_panel(rows, text, figure, axis)
        handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_recipient(axis: Axes, row: OrganResult, text: str) -> None:
    name, look = RECIPIENT
    if (ends := ends_of(row, text)) is not None:
        axis.axhspan(*ends, color=look.colour, alpha=0.07, linewidth=0, zorder=0)
    axis.axhline(value_of(row, text) or 0.0, color=look.colour, linestyle=look.line, linewidth=1.2, label=name, zorder=2)


def _draw_curve(axis: Axes, unsorted: Sequence[OrganResult], text: str, look: Look, *, trained: bool) -> None:
    points = sorted(unsorted, key=lambda row: row.at or 0)
    if not points:
        return
    xs, ys = [float(row.at or 0) for row in points], [value_of(row, text) or 0.0 for row in points]
    name = f"{points[0].organ}{'' if trained else ' untrained'}, {points[0].mode}"
    if trained:
        ends = [ends_of(row, text) or (y, y) for row, y in zip(points, ys, strict=True)]
        axis.fill_between(xs, [low for low, _ in ends], [high for _, high in ends], color=look.colour, alpha=0.12, linewidth=0)
    axis.plot(
        xs, ys, marker=look.marker, color=look.colour, linestyle=look.line, markeredgecolor=PAPER, label=name,
        linewidth=1.8 if trained else 1.2, markersize=6 if trained else 5, zorder=4 if trained else 3,
    )  # fmt: skip


def _scale(axis: Axes, shown: Sequence[OrganResult], text: str) -> None:
    drawn = [row for row in shown if row.role != "alone"]
    values = [value for row in drawn if (value := value_of(row, text)) is not None]
    places = sorted({row.at for row in drawn if row.at is not None})
    if values and max(values) > WIDE_RANGE * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=9))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 10_000 else f"{value:.0e}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if 0 < len(places) <= MOST_TICKS:
        axis.xaxis.set_major_locator(FixedLocator(places))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(places) == 1:
        axis.set_xlim(places[0] - 0.5, places[0] + 0.5)


def _marker(organ: int, mode: str) -> str:
    return MARKERS[(2 * organ + (mode != "insert")) % len(MARKERS)]
