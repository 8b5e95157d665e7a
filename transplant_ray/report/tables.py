"""All rows of a sweep as CSV, with every column of the run's own table, and as LaTeX for a paper."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transplant_ray.report.records import Row, measure_of
from transplant_ray.report.words import NOTHING, interval, measured_columns, number

_SPECIAL = re.compile(r"[\\&%$#_{}~^<>|\"]")
_WRITTEN = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip
_SYMBOLS = {"‖ΔW‖": r"$\|\Delta W\|$", "λ": r"$\lambda$", "–": "--", "÷": r"$\div$"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """One line per row of results.parquet: its label, then every column that it has; empty where there is no value."""
    columns = ["label", *(name for name in dict.fromkeys(name for row in table for name in row) if name != "label")]
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return written.getvalue()


def to_latex(rows: Sequence[Row], caption: str) -> str:
    """Every row, the measured columns."""
    columns = measured_columns(rows)
    titles = ["variant", "split", measure_of(rows).name, "95 % interval", *(column.title for column in columns)]
    lines = [_line(row, [column.shown(column.value(row)) for column in columns]) for row in rows]
    return longtable([*map(_title, titles)], lines, caption)


def longtable(titles: Sequence[str], lines: Iterable[Sequence[str]], caption: str) -> str:
    """A longtable with booktabs rules; titles and cells are LaTeX already, the first two columns are text."""
    heading = _latex_row(titles)
    return "\n".join(
        [
            r"% \usepackage{booktabs,longtable}",
            rf"\begin{{longtable}}{{ll{'r' * (len(titles) - 2)}}}",
            rf"\caption{{{escape_latex(caption)}}} \\",
            rf"\toprule {heading} \midrule \endfirsthead",
            rf"\toprule {heading} \midrule \endhead",
            r"\bottomrule \endfoot",
            *map(_latex_row, lines),
            r"\end{longtable}",
            "",
        ]
    )


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; control characters become spaces."""
    plain = _CONTROL.sub(" ", text)
    return _SPECIAL.sub(lambda match: _WRITTEN.get(match[0], f"\\{match[0]}"), plain)


def _line(row: Row, cells: Sequence[str]) -> list[str]:
    value = "failed" if row.error and row.value is None else number(row.value)
    return [
        latex_name(row.label, winner=row.winner),
        row.split,
        value,
        latex_cell(interval(row) or NOTHING),
        *map(latex_cell, cells),
    ]


def latex_name(label: str, *, winner: bool) -> str:
    return escape_latex(label) + (r" $\star$" if winner else "")


def latex_cell(text: str) -> str:
    """With LaTeX's dash between the ends of an interval."""
    return escape_latex(text).replace("–", "--")


def _title(text: str) -> str:
    return _SYMBOLS.get(text) or escape_latex(text).replace("‖ΔW‖", _SYMBOLS["‖ΔW‖"])
