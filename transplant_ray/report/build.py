"""From a run folder to its report."""

from __future__ import annotations

from pathlib import Path

from transplant_ray.files import write_text
from transplant_ray.report.page import headline, render
from transplant_ray.report.sweep import Sweep, read_sweep
from transplant_ray.report.tables import to_csv, to_latex
from transplant_ray.storage import RunFolder


def build_report(folder: RunFolder) -> Path:
    """Write `report.html`, `variants.csv` and `variants.tex` into a run folder; returns the first.

    The page is one file that needs no network, and the same run gives the same bytes. RunError where the folder, its results or
    its summary are missing, or a file is damaged; what an older run did not measure is said on the page.
    """
    sweep = read_sweep(folder)
    write_text(folder.variants_csv, to_csv(sweep.table))
    write_text(folder.variants_tex, to_latex(sweep.rows, _caption(sweep)))
    write_text(folder.report, render(sweep))
    return folder.report


def _caption(sweep: Sweep) -> str:
    verdict = headline(sweep)
    return f"All variants of the sweep {sweep.name}. {verdict.phrase}: {verdict.sentence}"
