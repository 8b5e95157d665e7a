"""`report`: made again from a folder or an address, and by the command line."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from runs import Made, write_run

from transplant_ray import cli
from transplant_ray.errors import RunError
from transplant_ray.pipeline.reporting import report

SMALL = Made(rankers=("lae",), kinds=("all",), ks=(1, 4), penalties=(), num_layers=2, num_examples=12)


def test_the_report_of_a_folder_is_written_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    assert report(folder.path) == folder.report
    first = [path.read_bytes() for path in folder.reports]
    for path in folder.reports:
        path.unlink()
    monkeypatch.setattr(sys, "argv", ["transplant-ray", "report", str(folder.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wrote {folder.report}\n"
    assert [path.read_bytes() for path in folder.reports] == first


def test_the_report_of_a_run_in_a_store_lands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_run(tmp_path / "store" / "made", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = report(f"file://{stored.path}")
    assert page.is_relative_to(tmp_path / "cache")
    assert [path.read_bytes() for path in stored.reports] == [(page.parent / path.name).read_bytes() for path in stored.reports]
    assert "prompt of example" in page.read_text(encoding="utf-8")  # outcomes and examples came too
    assert "modules by name" in page.read_text(encoding="utf-8")


def test_what_a_store_no_longer_has_is_not_in_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_run(tmp_path / "store" / "made", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report(f"file://{stored.path}")
    shutil.rmtree(stored.path)
    write_run(stored.path, dataclasses.replace(SMALL, newer=False, guards=()))
    page = report(f"file://{stored.path}").read_text(encoding="utf-8")
    assert "This run does not hold its prompts" in page
    assert "held out" not in page


def test_a_run_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RunError, match=r"nowhere/summary\.json: not there"):
        report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="nowhere: the storage cannot be used"):
        report(f"file://{tmp_path}/nowhere")
