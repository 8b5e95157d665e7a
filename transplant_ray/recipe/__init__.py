"""The recipe: everything a user decides, as frozen pydantic models; unknown keys are refused. `file` reads one from YAML."""

from transplant_ray.recipe.compare import CompareRecipe, InPlaceMethod, LoraMethod, MethodsSpec, OrganMethod, RoomSpec
from transplant_ray.recipe.corpus import CorpusSpec, MeasuredSpec
from transplant_ray.recipe.file import carry_recipe, load_compare_recipe, load_recipe, parse_recipe, parse_training
from transplant_ray.recipe.guards import GENERAL_TEXT, MAIN, GuardSpec, GuardTask, TextSpec
from transplant_ray.recipe.part import Kind
from transplant_ray.recipe.ranking import ACTIVATION_RANKERS, CHANNEL_RANKERS, RANKERS, RESIDENT_RANKERS, REVERSE, RankSpec
from transplant_ray.recipe.search import SEARCHES, GatesSpec, GreedySpec, SearchSettings, SearchSpec
from transplant_ray.recipe.sweep import (
    FEWEST_ARMS,
    MERGES,
    SPARSE_MERGES,
    ControlSpec,
    ObjectiveSpec,
    PrimarySpec,
    RaceSpec,
    ScreenSpec,
    SweepSpec,
)
from transplant_ray.recipe.tasks import CHOICE_SCORERS, HARNESS, REGEX, SCORERS, HubData, ShotSpec, SplitSpec, TaskSpec
from transplant_ray.recipe.training import BudgetSpec, TrainingSpec, WorkerSpec
from transplant_ray.recipe.whole import CARRIED, Acceptance, ModelSpec, Place, Recipe, ResourceSpec, TrackingSpec, redact

__all__ = [
    "ACTIVATION_RANKERS",
    "CARRIED",
    "CHANNEL_RANKERS",
    "CHOICE_SCORERS",
    "FEWEST_ARMS",
    "GENERAL_TEXT",
    "HARNESS",
    "MAIN",
    "MERGES",
    "RANKERS",
    "REGEX",
    "RESIDENT_RANKERS",
    "REVERSE",
    "SCORERS",
    "SEARCHES",
    "SPARSE_MERGES",
    "Acceptance",
    "BudgetSpec",
    "CompareRecipe",
    "ControlSpec",
    "CorpusSpec",
    "GatesSpec",
    "GreedySpec",
    "GuardSpec",
    "GuardTask",
    "HubData",
    "InPlaceMethod",
    "Kind",
    "LoraMethod",
    "MeasuredSpec",
    "MethodsSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "OrganMethod",
    "Place",
    "PrimarySpec",
    "RaceSpec",
    "RankSpec",
    "Recipe",
    "ResourceSpec",
    "RoomSpec",
    "ScreenSpec",
    "SearchSettings",
    "SearchSpec",
    "ShotSpec",
    "SplitSpec",
    "SweepSpec",
    "TaskSpec",
    "TextSpec",
    "TrackingSpec",
    "TrainingSpec",
    "WorkerSpec",
    "carry_recipe",
    "load_compare_recipe",
    "load_recipe",
    "parse_recipe",
    "parse_training",
    "redact",
]
