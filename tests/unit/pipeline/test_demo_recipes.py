"""The recipes that lie in `jobs/recipes` say what the demo does, and all that the demo writes can be read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from transplant_ray.pipeline import organ_demo as module
from transplant_ray.pipeline.comparison_planning import most_at_once
from transplant_ray.pipeline.demo_text import DemoText
from transplant_ray.pipeline.organ_demo import Place, compare_recipe, sweep_recipe
from transplant_ray.recipe import DemoSpec, TrackingSpec, load_compare_recipe, load_organ_recipe

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
ELSEWHERE = {"name", "storage", "tracking", "resources"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.of(tmp_path / "organ-demo", DemoSpec())


@pytest.fixture
def text(place: Place) -> DemoText:
    templates = {"general": "{text}", "domain": "{question}"}
    return DemoText(
        place.text, {name: {"file": str(place.text / f"{name}.jsonl"), "text": text} for name, text in templates.items()}
    )


def written(settings: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def content(recipe: Any) -> dict[str, Any]:
    """What decides the results, whoever has written the paths."""
    return resolved(recipe.model_dump(mode="json", exclude=ELSEWHERE))


def resolved(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: resolved(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(each) for each in value]
    return os.path.normpath(value.rpartition("organ-demo/")[2]) if isinstance(value, str) else value


@pytest.mark.parametrize("cpus", [None, 1, 3])
def test_the_comparison_is_that_of_the_demo(place: Place, text: DemoText, cpus: int | None) -> None:
    ours = load_compare_recipe(RECIPES / "organ-demo.yaml")
    settings = compare_recipe(DemoSpec(), place, text, TrackingSpec(), cpus)
    demo = load_compare_recipe(written(settings, place.here / "compare.yaml"))
    assert content(ours) == content(demo)
    assert demo.resources == ours.resources.model_copy(update={"at_once": cpus})
    assert most_at_once(demo) == (9 if cpus is None else cpus)  # three methods at three rates


@pytest.mark.parametrize("cpus", [None, 1, 3])
def test_the_sweep_is_that_of_the_demo(place: Place, text: DemoText, cpus: int | None) -> None:
    ours = load_organ_recipe(RECIPES / "organ-demo-sweep.yaml")
    settings = sweep_recipe(DemoSpec(), place, text, TrackingSpec(), cpus)
    demo = load_organ_recipe(written(settings, place.here / "sweep.yaml"))
    assert content(ours) == content(demo)
    assert demo.resources == ours.resources.model_copy(update={"evaluators": cpus or 1})


def test_cores_that_are_given_bound_every_stage_of_the_demo(place: Place, text: DemoText, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "build", lambda *_, threads, **__: (text, seen.update(model=threads)))
    monkeypatch.setattr(module, "_trained", lambda _, __, ___, threads, *____: seen.update(organ=threads))
    monkeypatch.setattr(module, "sweep_organs", lambda recipe, _: seen.update(sweep=recipe.resources.evaluators))
    monkeypatch.setattr(module, "compare", lambda recipe, _: seen.update(compare=most_at_once(recipe)))
    monkeypatch.setattr(module, "_record", lambda _: {})
    module.organ_demo(DemoSpec(), place.folder, cpus=1)
    assert seen == {"model": 1, "organ": 1, "sweep": 1, "compare": 1}


def test_the_full_comparison_is_of_both_models_under_three_seeds_with_one_budget() -> None:
    full = load_compare_recipe(RECIPES / "organ-comparison.yaml")
    assert list(full.models) == ["gpt2", "llama"]
    assert len(full.seeds) == 3
    assert full.training.share[0] >= full.domain.share[1]
    assert set(full.methods.wanted) == {"organ", "lora", "full"}
    assert full.training.context == DemoSpec().context
