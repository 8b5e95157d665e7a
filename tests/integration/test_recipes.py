"""Every recipe under jobs/recipes is planned: the zoo's as they are, the paper's against header-only full-size models.

What the paper's ask, with and without a chat template, is in `unit/pipeline/test_paper_recipes.py`; those of organs are of kinds of
their own, and held in `unit/pipeline/test_demo_recipes.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from header_files import sparse_checkpoint
from integration.helpers import REPOSITORY
from tiny import tiny_tokenizer
from transformers import Gemma2Config, Phi3Config, PretrainedConfig

from transplant_ray import load_recipe, zoo
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.pipeline.planning import make_plan

RECIPES = REPOSITORY / "jobs" / "recipes"
MATH500 = REPOSITORY.parent / "shared" / "data" / "math500" / "test.jsonl"
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # those of the tokenizer that stands in

PAPER: dict[str, tuple[PretrainedConfig, int, int, int]] = {
    # The defaults of both config classes are the models of the paper. Then: modules, parameters, cached numbers a token.
    "paper-phi3": (Phi3Config(**TOKENS), 128, 3_821_079_552, 2 * 32 * 32 * 96),
    "paper-gemma2": (Gemma2Config(**TOKENS), 182, 2_614_341_888, 2 * 26 * 4 * 256),
}


ORGANS = ("organ-comparison", "organ-demo", "organ-demo-sweep")
ZOO = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in (*PAPER, *ORGANS))


def test_the_recipes_are_those_of_the_zoo_of_the_paper_and_of_organs() -> None:
    assert set(ZOO) == set(zoo.PAIRS)
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*ZOO, *PAPER, *ORGANS}


@pytest.mark.parametrize("name", [*ZOO, *PAPER])
def test_a_recipe_loads_from_any_working_directory(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert (recipe.storage, recipe.tracking.uri) == ("runs", "sqlite:///mlflow.db")


@pytest.mark.parametrize("name", ZOO)
def test_a_zoo_recipe_is_planned_as_it_is(name: str) -> None:
    job = prepare(load_recipe(RECIPES / f"{name}.yaml"))
    assert job.recipe == load_recipe(zoo.recipe_path(name))  # the demo's
    report = make_plan(job)
    assert report.modules_per_kind["all"] >= 24
    assert not report.excluded
    assert report.variants["trial"] > 0


@pytest.fixture(scope="module", params=PAPER)
def paper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a recipe, and a folder with two full-size models for it that take no disk."""
    folder = tmp_path_factory.mktemp(request.param)
    for role in ("source", "target"):
        sparse_checkpoint(folder / role, PAPER[request.param][0], shard_bytes=2 * 10**9)
        tiny_tokenizer().save_pretrained(folder / role)
    return request.param, folder


def questions(folder: Path, where: str) -> Path:
    """MATH-500 itself, or as many questions of the same columns."""
    if where == "math500":
        if not MATH500.exists():
            pytest.skip(f"{MATH500} is not on this machine")
        return MATH500
    path = folder / "questions.jsonl"
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned(paper: tuple[str, Path], where: str) -> Job:
    name, folder = paper
    overrides = [f"source.model={folder}/source", f"target.model={folder}/target", f"task.data={questions(folder, where)}"]
    return prepare(load_recipe(RECIPES / f"{name}.yaml", overrides))


@pytest.mark.parametrize("where", ["math500", "stand-in"])
def test_a_paper_recipe_is_planned_against_full_size_headers(paper: tuple[str, Path], where: str) -> None:
    config, num_modules, num_parameters, cached = PAPER[paper[0]]
    job = planned(paper, where)
    report = make_plan(job)
    assert report.modules_per_kind["all"] == num_modules
    assert (report.num_layers, report.excluded) == (config.num_hidden_layers, ())
    assert report.examples == {"probe": 50, "select": 200, "test": 250}
    longest = max(len(e.prompt_ids) for examples in job.examples.values() for e in examples) + 32
    probe, evaluator = report.memory["probe actor"], report.memory["evaluator"]
    assert probe.weights == 2 * num_parameters  # bfloat16
    assert 1.6 * probe.weights < evaluator.weights < 2 * probe.weights  # the source's modules too, its embeddings not
    assert probe.cache == evaluator.cache == 64 * longest * cached * 2
    assert report.variants["control"] > report.variants["trial"] > 0
