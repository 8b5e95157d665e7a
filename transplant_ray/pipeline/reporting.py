"""`report`: the report of a finished sweep, made again from its run folder."""

from __future__ import annotations

from pathlib import Path

from transplant_ray.report.build import build_report
from transplant_ray.report.organs import KIND, OrganRun, build_organ_report, read_organ_run
from transplant_ray.storage import RunFolder


def show_organs(run: str | Path) -> OrganRun | None:
    """What a finished organ sweep found; None for a run of another kind."""
    folder = RunFolder.open(str(run))
    return read_organ_run(folder) if _is_of_organs(folder) else None


def report(run: str | Path) -> Path:
    """Write `report.html`, `variants.csv` and `variants.tex` of a finished run, and return the first; a remote run gets them too.

    An organ sweep has no `variants.tex`.

    RunError where the run is not there, or a file of it is damaged.
    """
    folder = RunFolder.open(str(run))
    if _is_of_organs(folder):
        page = build_organ_report(folder)
        folder.send(folder.report, folder.variants_csv)
        return page
    answers = [folder.outcomes / f"{split}.parquet" for split in ("select", "test")]
    folder.fetch_present(*answers, folder.delta / "variant.json")
    page = build_report(folder)
    folder.send(*folder.reports)
    return page


def _is_of_organs(folder: RunFolder) -> bool:
    return folder.summary.exists() and folder.read_summary().get("kind") == KIND
