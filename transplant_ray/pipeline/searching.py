"""From what a search found to trials of the sweep, and to what the summary says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transplant_ray.graft.plan import Planned
from transplant_ray.probe.search import Found
from transplant_ray.recipe import GatesSpec, Recipe


def planned_searches(recipe: Recipe, found: Mapping[str, Sequence[Found]]) -> list[Planned]:
    """A trial for everything that was found; one that found the target itself is none."""
    specs = {} if recipe.search is None else recipe.search.wanted
    planned = []
    for name, results in found.items():
        spec = specs[name]
        ranker = f"{name} {spec.unit}" if isinstance(spec, GatesSpec) else name
        planned += [
            Planned("trial", result.variant, ranker, spec.kind, None, 1.0, penalty=result.penalty)
            for result in results
            if result.variant.coefficients
        ]
    return planned


def describe_searches(found: Mapping[str, Sequence[Found]]) -> dict[str, list[dict[str, Any]]]:
    """For `summary.json`: what was fitted on the probe set, what rounding cost, and what it took."""
    return {name: [_describe(result) for result in results] for name, results in found.items()}


def _describe(result: Found) -> dict[str, Any]:
    described = {**vars(result), "variant": result.variant.id, "cost": asdict(result.cost), "order": list(result.order)}
    described["num_modules"] = len(result.variant.coefficients)
    return described
