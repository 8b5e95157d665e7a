"""Find the modules whose weights bring a lost ability back to a language model, transplant them, and prove it.

    from transplant_ray import load_recipe, sweep

    result = sweep(load_recipe("jobs/recipes/cross-generation.yaml"))
    print(result.winner)

The verbs are those of the command line; they are imported when they are first used, for Ray and MLflow take seconds.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Variant": "graft.variant",
    "Engine": "evaluate.engine",
    "ResidentPair": "graft.resident",
    "demo": "pipeline.sweeping",
    "plan": "pipeline.planning",
    "rank": "pipeline.sweeping",
    "sweep": "pipeline.sweeping",
    "export": "pipeline.exporting",
    "apply": "pipeline.exporting",
    "show": "pipeline.exporting",
    "extract": "pipeline.organs",
    "insert": "pipeline.organs",
    "remove": "pipeline.organs",
    "train": "pipeline.organ_training",
    "TrainingSpec": "recipe",
    "OrganRecipe": "recipe",
    "load_organ_recipe": "recipe",
    "sweep_organs": "pipeline.organ_sweeping",
    "compare": "pipeline.comparing",
    "CompareRecipe": "recipe",
    "load_compare_recipe": "recipe",
    "TransplantError": "errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
