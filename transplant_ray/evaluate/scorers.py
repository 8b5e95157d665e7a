"""Scorers: pure functions from a completion and the reference answer to right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

Scorer = Callable[[str, str], bool]


def exact(completion: str, answer: str) -> bool:
    """Equal as strings, white space at both ends aside."""
    return completion.strip() == answer.strip()


FORCED = "forced"
"""Right if and only if greedy decoding would emit exactly the reference's tokens; decided without decoding (`read`)."""

SCORERS: Mapping[str, Scorer] = MappingProxyType({"exact": exact})
