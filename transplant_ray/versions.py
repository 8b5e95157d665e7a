"""Versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

LIBRARIES = ("transplant-ray", "ray", "torch", "transformers", "safetensors", "mlflow", "numpy", "pyarrow")
DECIDING = ("transplant-ray", "torch", "transformers", "math-verify", "lm_eval")
"""Libraries of which another version may give another outcome."""


def versions(names: Iterable[str]) -> dict[str, str]:
    return {name: _version(name) for name in names}


def public_version(version: str) -> str:
    """Without the local part, which names a build and not other code: `2.13.0+cpu` and `2.13.0` are one version."""
    return version.partition("+")[0]


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), **versions(LIBRARIES)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # our own package need not be installed where it travels with a job
        return "not installed"
