"""A source, a recipient and an organ of every family whose layers can be moved, written to disk once."""

from __future__ import annotations

import pytest
from stacks import FAMILIES, Pair, make_pair

KIN = {"gemma", "gemma3_text", "gpt_neox", "qwen3"}
"""Much like others: `make test` takes them, `.ci/run` does not."""


@pytest.fixture(scope="session", params=[pytest.param(each, marks=pytest.mark.slow if each in KIN else []) for each in FAMILIES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama-alone"))
