"""The merging baselines of a recipe, as entries of a plan."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from transplant_ray.graft.plan import Planned
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.recipe import ControlSpec

MASK_SEED = 42
"""Of the masks that DARE draws."""


def planned_merges(controls: ControlSpec) -> tuple[Planned, ...]:
    """Every merge at every λ, which stands in `alpha`. Their variant is empty: they are no points in coefficient space."""
    seeds = {merge: MASK_SEED if merge.startswith("dare") else None for merge in controls.merges}
    planned = [
        Planned("control", ORIGIN, merge, "all", None, scale, seed) for merge, seed in seeds.items() for scale in controls.scales
    ]
    return tuple(replace(merge, name=_merge_id(merge)) for merge in planned)


def _merge_id(planned: Planned) -> str:
    """Like a variant's id: a hash of what tells a merge from the others of its run."""
    return hashlib.sha256(merge_name(planned).encode()).hexdigest()[:10]


def merge_name(planned: Planned) -> str:
    """For files, e.g. `ties-0.5`."""
    return f"{planned.ranker}-{planned.alpha:g}"
