"""The searches, by the names that a recipe has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transplant_ray.probe.gates import fit_gates
from transplant_ray.probe.greedy import greedy
from transplant_ray.probe.search import Found, Search

SEARCHES: Mapping[str, Callable[[Search, Any], list[Found]]] = MappingProxyType({"gates": fit_gates, "greedy": greedy})
"""Each takes the settings of its own name."""
