"""Versions of what a result depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURSELVES = "transplant-ray"
LIBRARIES = (OURSELVES, "ray", "torch", "transformers", "safetensors", "mlflow", "numpy", "pyarrow")
CODE = "transplant-ray's code"
"""A name by which `versions` tells `source_hash`."""
DECIDING = (CODE, "torch", "transformers", "tokenizers", "math-verify", "sympy", "lm_eval")
"""Of which another version may give another outcome."""
HERE = Path(__file__).parent
DECIDING_PARTS = ("evaluate", "graft", "models", "organ")
"""Folders of this package whose code decides what an outcome is."""


def versions(names: Iterable[str]) -> dict[str, str]:
    return {name: _version(name) for name in names}


def public_version(version: str) -> str:
    """Without the part that says how it was built: `2.13.0+cpu` and `2.13.0` are one version of torch."""
    return version.partition("+")[0]


def source_hash() -> str:
    """Of our own code that decides what an outcome is.

    A version number says less: it is the same while the code is being changed, and not known where the package travels with a job.
    """
    found = hashlib.sha256()
    for path in sorted(path for part in DECIDING_PARTS for path in (HERE / part).rglob("*.py")):
        found.update(f"{path.relative_to(HERE).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), **versions(LIBRARIES)}


def _version(name: str) -> str:
    if name == CODE:
        return source_hash()[:16]
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # our own package need not be installed where it travels with a job
        return "not installed"
