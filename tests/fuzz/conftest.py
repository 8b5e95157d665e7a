"""What every spoilt input is held to: an end in time, without the memory that it claims."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 60
"""For each of them: most take milliseconds, and a machine can be busy."""
ROOM = 2 * 2**30
"""Of addresses, beside what the process has already."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Who allocates what a file claims gets a MemoryError: Linux would hand out any size, as long as nobody writes to it."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
