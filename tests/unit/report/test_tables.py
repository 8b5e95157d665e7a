"""CSV and LaTeX hold every row, whatever stands in them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from runs import Made, result_rows

from transplant_ray.report.records import Row, read_records, with_label
from transplant_ray.report.tables import escape_latex, to_csv, to_latex
from transplant_ray.report.words import measured_columns

TABLE = [with_label(row) for row in result_rows(Made(rankers=("lae",), ks=(1, 4)))]
ROWS = read_records(Row, TABLE, Path("x"))
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


def test_csv_has_every_row_and_every_column() -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert read == [{name: "" if value is None else str(value) for name, value in row.items()} for row in TABLE]
    assert next(iter(read[0])) == "label"


@given(TEXT.filter(lambda text: "\r" not in text), st.sampled_from(["error", "ranker", "new column"]))
def test_csv_gives_back_any_text(text: str, column: str) -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv([{"label": text, column: text}]), newline=""))
    assert row == {"label": text, column: text}


def test_latex_has_every_row_with_all_measured_columns() -> None:
    latex = to_latex(ROWS, "caption")
    body = latex.split(r"\endfoot")[1].split(r"\end{longtable}")[0].strip().splitlines()
    assert len(body) == len(ROWS)
    for line, row in zip(body, ROWS, strict=True):
        cells = line.removesuffix(r" \\").split(" & ")
        assert len(cells) == 4 + len(measured_columns(ROWS))
        assert cells[:3] == [escape_latex(row.label) + (r" $\star$" if row.winner else ""), row.split, f"{row.accuracy:.3f}"]
    assert sum(r"\star" in line for line in body) == 2  # on select and on test
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_columns_that_were_not_measured_are_left_out() -> None:
    older = [row.model_copy(update={"moved": None, "kl": None}) for row in ROWS]
    titles = {column.title for column in measured_columns(ROWS)} - {column.title for column in measured_columns(older)}
    assert titles == {"‖ΔW‖ moved", "KL"}
    assert "KL" not in to_latex(older, "caption")


def test_a_failed_row_says_so() -> None:
    failed = ROWS[3].model_copy(update={"accuracy": None, "score": None, "error": "broken", "ci_low": None, "tir": None})
    assert "& failed &" in to_latex([failed], "caption")


COMMANDS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<", r"\textgreater{}": ">",
    r"\textbar{}": "|", r"\textquotedbl{}": '"',
}  # fmt: skip


@given(TEXT)
def test_what_latex_prints_is_the_text(text: str) -> None:
    printed = re.sub(r"\\text\w+\{\}|\\([&%$#_{}])|[&%$#_{}~^<>|\"\\]", _printed, escape_latex(text))
    assert printed == re.sub("[\x00-\x1f\x7f\u2028\u2029]+", " ", text)


def _printed(match: re.Match[str]) -> str:
    assert len(match[0]) > 1, f"{match[0]!r} means something to LaTeX"
    return match[1] or COMMANDS[match[0]]
