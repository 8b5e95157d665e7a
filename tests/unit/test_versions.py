"""Versions, for the record."""

from __future__ import annotations

import importlib.metadata

from transplant_ray.versions import public_version, versions


def test_a_package_that_only_travels_with_a_job_is_told_as_not_installed() -> None:
    assert versions(["transplant-ray-elsewhere", "ray"]) == {
        "transplant-ray-elsewhere": "not installed",
        "ray": importlib.metadata.version("ray"),
    }


def test_builds_of_a_version_are_one_version() -> None:
    assert [public_version(version) for version in ("2.13.0", "2.13.0+cpu", "2.13.0+cu130")] == ["2.13.0"] * 3
