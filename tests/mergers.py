"""mergekit, where it is installed: `make mergekit` makes a venv with it, and CI has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from transplant_ray.graft.mergekit import PIP_LINE, find_mergekit


def mergekit_or_skip() -> Path:
    program = find_mergekit()
    if program is None:
        pytest.skip(
            f"no mergekit-yaml: `make mergekit`, then TRANSPLANT_RAY_MERGEKIT=.venv-mergekit/bin/mergekit-yaml ({PIP_LINE})"
        )
    return program
