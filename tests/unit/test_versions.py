"""Versions, for the record."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from transplant_ray import versions as module
from transplant_ray.versions import DECIDING_PARTS, HERE, public_version, source_hash, versions


def test_a_package_that_only_travels_with_a_job_is_told_as_not_installed() -> None:
    assert versions(["transplant-ray-elsewhere", "ray"]) == {
        "transplant-ray-elsewhere": "not installed",
        "ray": importlib.metadata.version("ray"),
    }


@pytest.mark.parametrize(
    ("told", "public"),
    [("2.13.0+cpu", "2.13.0"), ("2.13.0", "2.13.0"), ("2.14.0.dev1+cu128", "2.14.0.dev1"), ("not installed",) * 2],
)
def test_how_a_library_was_built_is_no_other_version(told: str, public: str) -> None:
    assert public_version(told) == public


@pytest.mark.parametrize("part", DECIDING_PARTS)
def test_code_that_decides_outcomes_has_another_hash_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Also where the package is a copy that travelled with a job, and nothing is installed."""
    for name in (*DECIDING_PARTS, "report"):
        shutil.copytree(HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    here = source_hash()
    monkeypatch.setattr(module, "HERE", tmp_path)
    assert source_hash() == here
    (tmp_path / "report" / "page.py").write_text("changed")
    assert source_hash() == here
    path = sorted((tmp_path / part).glob("*.py"))[1]
    text = path.read_text()
    path.write_text(text + "# changed")
    assert source_hash() != here
    path.write_text(text)
    path.rename(path.with_name("renamed.py"))
    assert source_hash() != here
