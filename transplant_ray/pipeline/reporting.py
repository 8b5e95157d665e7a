"""`report`: the report of a finished sweep or comparison, made again from its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transplant_ray.report import comparison, organs
from transplant_ray.report.build import build_report
from transplant_ray.report.comparison import build_comparison_report, read_comparison
from transplant_ray.report.organs import OrganRun, build_organ_report, read_organ_run
from transplant_ray.storage import RunFolder


def show_organs(run: str | Path) -> OrganRun | None:
    """What a finished organ sweep found; None for a run of another kind."""
    folder = RunFolder.open(str(run))
    return read_organ_run(folder) if _kind(folder) == organs.KIND else None


def show_comparison(run: str | Path) -> Mapping[str, Any] | None:
    """The summary of a finished comparison; None for a run of another kind."""
    folder = RunFolder.open(str(run))
    return read_comparison(folder) if _kind(folder) == comparison.KIND else None


def report(run: str | Path) -> Path:
    """Write the report of a finished run and its tables, and return the report; a remote run gets them too.

    Beside `report.html` that are `variants.csv` and `variants.tex`; of a comparison `comparison.csv` and
    `comparison.tex`.

    RunError where the run is not there, or a file of it is damaged.
    """
    folder = RunFolder.open(str(run))
    kind = _kind(folder)
    if kind == comparison.KIND:
        return build_comparison_report(folder)  # which is never at an address
    if kind == organs.KIND:
        page = build_organ_report(folder)
        folder.send(*folder.reports)
        return page
    answers = [folder.outcomes / f"{split}.parquet" for split in ("select", "test")]
    folder.fetch_present(*answers, folder.delta / "variant.json")
    page = build_report(folder)
    folder.send(*folder.reports)
    return page


def _kind(folder: RunFolder) -> str | None:
    """What wrote it; None for a transplant sweep, and where nothing has been finished."""
    return folder.read_summary().get("kind") if folder.summary.exists() else None
