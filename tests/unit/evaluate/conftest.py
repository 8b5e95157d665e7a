"""A tiny resident pair, for tests of what reads and answers with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import tiny_pair

from transplant_ray.graft.resident import ResidentPair, load_resident_pair


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> ResidentPair:
    return load_resident_pair(tiny_pair(tmp_path_factory.mktemp("phi3"), "phi3"), "float32")


@pytest.fixture
def pair(resident: ResidentPair) -> Iterator[ResidentPair]:
    """Whatever a test does, the model is the target afterwards."""
    yield resident
    assert all(graft.linear.weight is graft.target.weight for graft in resident.grafts.values())
    assert not any("forward" in part.__dict__ for part in resident.model.modules())
