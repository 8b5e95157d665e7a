"""What a comparison would do: its trainings counted, and every error that needs neither weights nor text to be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.organ.extract import select_layers
from transplant_ray.organ.learners import require_peft
from transplant_ray.organ.lessons import TEXTS
from transplant_ray.organ.stack import read_stack
from transplant_ray.organ.text import data_files
from transplant_ray.pipeline.organ_training import settle
from transplant_ray.recipe import CompareRecipe, HubData, InPlaceMethod, OrganMethod, TrainingSpec, WorkerSpec


@dataclass(frozen=True)
class Planned:
    """What a comparison would do, of one model."""

    model: str
    recipient: Checkpoint
    layers: Mapping[str, str]
    """Of organ and in_place, as they are counted."""
    trainings: int
    steps: int
    tokens: int
    """Of each."""
    measurings: int
    """How often a text is read to measure: more than once a training only for organs, once for each position and mode."""


def plan(recipe: CompareRecipe, checkpoints: Mapping[str, Checkpoint] | None = None) -> list[Planned]:
    """What a comparison would do, and every error that needs no weights and no text to be found."""
    if recipe.methods.lora is not None:
        require_peft()
    for corpus in (recipe.training, recipe.domain, recipe.general):
        for each in corpus.data:
            _ = each if isinstance(each, HubData) else data_files(each)
    found = []
    for name in recipe.named_models:
        recipient = (checkpoints or {}).get(name) or open_recipient(recipe, name)
        training = settled(recipe, recipient)
        num_layers = len(read_stack(recipient).layers)
        ranges = {method: select_layers(layers_of(recipe, method), num_layers) for method in stacked(recipe)}
        num = len(recipe.tune.lr) + len(recipe.seeds)
        sites = 2 * num_layers + 2 - len(ranges["organ"]) if "organ" in ranges else 0
        others = len(recipe.methods.wanted) - ("organ" in ranges)
        found.append(
            Planned(
                name,
                recipient,
                {method: str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" for method, layers in ranges.items()},
                num * len(recipe.methods.wanted),
                training.num_steps,
                training.num_tokens,
                num * (sites + others) + len(TEXTS) * len(recipe.seeds) * len(recipe.methods.wanted) + 1 + len(TEXTS),
            )
        )
    return found


def open_recipient(recipe: CompareRecipe, name: str) -> Checkpoint:
    """Trainings run in other folders, so its path is absolute."""
    spec = recipe.named_models[name]
    checkpoint = open_checkpoint(spec.model, spec.revision)
    return checkpoint if checkpoint.folder is None else replace(checkpoint, folder=checkpoint.folder.resolve())


def settled(recipe: CompareRecipe, recipient: Checkpoint) -> TrainingSpec:
    return settle(recipe.training.training(recipe.tune.lr[0], recipe.tune.seed), WorkerSpec(gpus=recipe.resources.gpus), recipient)


def stacked(recipe: CompareRecipe) -> list[str]:
    """The methods that train a stack of layers."""
    return [name for name, spec in recipe.methods.wanted.items() if isinstance(spec, OrganMethod | InPlaceMethod)]


def layers_of(recipe: CompareRecipe, method: str) -> str:
    spec = recipe.methods.wanted[method]
    assert isinstance(spec, OrganMethod | InPlaceMethod)
    return spec.layers if spec.layers is not None else recipe.methods.layers


def most_at_once(recipe: CompareRecipe) -> int:
    """Trainings that do not wait for each other, and may go side by side."""
    most = len(recipe.named_models) * len(recipe.methods.wanted) * max(len(recipe.tune.lr), len(recipe.seeds))
    return most if recipe.resources.at_once is None else min(most, recipe.resources.at_once)
