"""A source, a recipient and an organ of every family whose layers can be moved, written to disk once."""

from __future__ import annotations

import pytest
from stacks import FAMILIES, Pair, make_pair


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama-alone"))
