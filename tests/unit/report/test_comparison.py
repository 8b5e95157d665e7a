"""What a comparison says, in its table, on its page and in a terminal, on made-up numbers against computations by hand."""

from __future__ import annotations

import io
from math import exp, log, sqrt
from statistics import fmean, stdev

import pytest
from comparisons import BEFORE, PERPLEXITIES, made_comparison
from pages import Page
from rich.console import Console
from scipy import stats

from transplant_ray.cli_organ_compare import print_comparison
from transplant_ray.report.comparison import COLUMNS, method_rows, render, to_latex

SIGNS = (1 + 3) + 3
"""Of the methods and the model as it is, and of the methods again."""
PANELS = 1 + 2 + 1
"""Of a model: the trade, the positions of both modes, the learning rates."""
EVIL = "<script src=//x>$_&"


def cell(value: float, digits: int = 4) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def test_every_cell_of_the_table_is_what_a_hand_computes() -> None:
    rows = [dict(zip(range(len(COLUMNS)), row, strict=True)) for row in method_rows(made_comparison(["gpt2"]))]
    assert COLUMNS == (
        "model", "method", "lr", "domain", "× before", "general", "× before", "trained", "to ship", "training", "put in",
    )  # fmt: skip
    assert list(rows[0].values()) == ["gpt2", "before", "", "1,207", "", "80.52", "", "", "", "", ""]
    for row, method in zip(rows[1:], ("organ", "lora", "full"), strict=True):
        for column, perplexity, before in zip((3, 5), PERPLEXITIES[method], BEFORE, strict=True):
            losses = [log(perplexity * 1.2**seed) for seed in range(3)]
            half = stats.t.ppf(0.975, 2) * stdev(losses) / sqrt(3)
            low, mean, high = (exp(fmean(losses) + by) for by in (-half, 0, half))
            assert row[column] == f"{cell(mean)} [{cell(low)}, {cell(high)}]"
            assert row[column + 1] == cell(mean / before, 3)
    assert [(row[1], row[2], row[7], row[8], row[9], row[10]) for row in rows[1:]] == [
        ("organ", "0.001 (edge)", "593,280", "2.39 MB", "31 s [28.5, 33.5]", "replace at 0 × 3"),
        ("LoRA", "0.001 (edge)", "131,072", "545 kB", "31 s [28.5, 33.5]", ""),
        ("full fine-tuning", "0.001 (edge)", "1,864,960", "7.46 MB", "31 s [28.5, 33.5]", ""),
    ]


def test_one_seed_has_no_interval() -> None:
    assert [row[3] for row in method_rows(made_comparison(["gpt2"], seeds=[0]))] == ["1,207", "812", "93.4", "88.2"]


def test_the_page_has_every_figure_and_needs_no_network() -> None:
    html = render(made_comparison())
    page = Page.of(html)
    assert html.count("<svg") == SIGNS + 2 * PANELS
    assert not [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]
    assert not {"script", "link", "iframe", "img", "image"} & set(page.tags)
    assert page.references <= set(page.ids)
    assert "@import" not in html
    for row in method_rows(made_comparison()):
        assert row[3] in page.text


def test_losses_that_have_no_perplexity_are_drawn_too() -> None:
    summary = made_comparison(["gpt2"])
    for choice in summary["choices"]:
        for rate in choice["rates"]:
            rate["loss"] += 1000.0
    assert render(summary).count("<svg") == SIGNS + PANELS


def test_whatever_a_comparison_says_is_text() -> None:
    html = render(made_comparison([EVIL, "b"], name=f"n{EVIL}", said=[EVIL], environment={"python": EVIL}))
    assert "<script" not in html
    assert f"n{EVIL}" in Page.of(html).text
    assert html.count("<svg") == SIGNS + 2 * PANELS
    assert r"\caption{n\textless{}script src=//x\textgreater{}\$\_\&: perplexity on test" in to_latex(
        made_comparison(name=f"n{EVIL}")
    )


@pytest.mark.parametrize("wide", [1.0, 1e4], ids=["as measured", "large numbers"])
def test_the_table_in_a_terminal_of_80_columns_is_whole(wide: float) -> None:
    """Numbers, intervals over three seeds among them, are neither cut nor broken within; lines end within the terminal."""
    summary = made_comparison()
    for standing in summary["standings"]:
        standing["parameters"] = round(standing["parameters"] * wide)
        standing["loss"] = {text: loss + log(wide) for text, loss in standing["loss"].items()}
        standing["interval"] = {text: [end + log(wide) for end in ends] for text, ends in standing["interval"].items()}
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(console, summary)
    tables = console.export_text().split("Each method had")[0]
    assert "…" not in tables
    assert max(map(len, tables.splitlines())) <= 80
    words = tables.split()
    for _, method, lr, domain, _, general, _, *rest in method_rows(summary):
        numbers = [
            lr.replace(" (edge)", "*"),
            *(each.strip("[],") for each in " ".join([domain, general, rest[2]]).split()),
            rest[0],
        ]
        assert [number for number in numbers if number and number not in words] == []
        assert all(text in tables for text in (method, rest[1], rest[3]))
    if wide == 1:  # and there each interval is in one line
        assert all(row[3].partition("[")[2].rstrip("]").replace(", ", " – ") in tables for row in method_rows(summary))
