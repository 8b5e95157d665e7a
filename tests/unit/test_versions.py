"""Versions, for the record."""

from __future__ import annotations

import importlib.metadata

from transplant_ray.versions import versions


def test_a_package_that_only_travels_with_a_job_is_told_as_not_installed() -> None:
    assert versions(["transplant-ray-elsewhere", "ray"]) == {
        "transplant-ray-elsewhere": "not installed",
        "ray": importlib.metadata.version("ray"),
    }
