"""The zoo is what its record says: hashes, sizes, counts, and the accuracies that pairs were chosen by."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from transplant_ray import zoo
from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.generate import GenerationSettings, end_ids
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.evaluate.task import make_example, read_data, tokenize
from transplant_ray.models.checkpoint import open_checkpoint, read_generation_ends
from transplant_ray.models.compare import compare
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.recipe import TaskSpec, load_recipe

RECORD: dict[str, Any] = json.loads((zoo.HOME / "zoo.json").read_text())
MEGABYTE = 1_000_000


@pytest.mark.parametrize("pair", zoo.PAIRS)
def test_weights_are_those_that_were_recorded(pair: str) -> None:
    recorded = RECORD[pair]["sha256"]
    assert set(recorded) == {"source/model.safetensors", "target/model.safetensors"}
    for file, digest in recorded.items():
        assert hashlib.sha256((zoo.HOME / pair / file).read_bytes()).hexdigest() == digest


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in zoo.HOME.rglob("*") if path.is_file()) <= 12 * MEGABYTE


@pytest.mark.parametrize("pair", zoo.PAIRS)
def test_a_pair_has_enough_modules_and_nothing_is_left_out(pair: str) -> None:
    comparison = compare(open_checkpoint(f"zoo:{pair}/source"), open_checkpoint(f"zoo:{pair}/target"))
    assert len(comparison.pairs) >= 24
    assert comparison.excluded == ()


@pytest.mark.parametrize("pair", zoo.PAIRS)
def test_tasks_are_large_and_without_duplicates(pair: str) -> None:
    rows = {task: read_data(f"zoo:{pair}/tasks/{task}.jsonl") for task in ("lost", "shared", "target_only")}
    assert len(rows["lost"]) >= 900
    assert min(len(rows["shared"]), len(rows["target_only"])) >= 400
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("pair", zoo.PAIRS)
def test_recorded_accuracies_make_it_a_pair(pair: str) -> None:
    accuracy = {task: record["accuracy"] for task, record in RECORD[pair]["tasks"].items()}
    lost, shared, target_only = accuracy["lost"], accuracy["shared"], accuracy["target_only"]
    assert 0.02 <= lost["target"] <= 0.6
    assert lost["source"] >= (lost["target"] + 0.2 if pair == "siblings" else 0.9)
    assert min(shared.values()) >= 0.85
    assert target_only["target"] > target_only["source"] + 0.2


@pytest.mark.parametrize("pair", zoo.PAIRS)
@pytest.mark.parametrize("role", ["source", "target"])
def test_a_model_reaches_its_recorded_accuracy(pair: str, role: str) -> None:
    """On the first 200 rows, within four standard errors of the recorded accuracy on all rows."""
    spec = load_recipe(zoo.recipe_path(pair)).task
    accuracy, n = _accuracy(f"zoo:{pair}/{role}", spec, rows=200)
    recorded = RECORD[pair]["tasks"]["lost"]["accuracy"][role]
    assert abs(accuracy - recorded) <= 4 * max(recorded * (1 - recorded) / n, 1 / n**2) ** 0.5 + 1 / n


def test_names_cannot_leave_the_zoo() -> None:
    with pytest.raises(RecipeError, match="no such file"):
        zoo.resolve("zoo:../errors.py")
    with pytest.raises(RecipeError, match="cross-generation"):
        zoo.recipe_path("crossgeneration")


def test_recipes_under_jobs_are_the_ones_that_ship() -> None:
    recipes = Path(__file__).parents[2] / "jobs" / "recipes"
    assert all((recipes / f"{pair}.yaml").resolve() == zoo.recipe_path(pair).resolve() for pair in zoo.PAIRS)


def _accuracy(model: str, spec: TaskSpec, rows: int) -> tuple[float, int]:
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    assert isinstance(spec.data, str)
    examples = [make_example(row, spec, "zoo") for row in read_data(spec.data)[:rows]]
    settings = GenerationSettings(spec.max_new_tokens, end_ids(read_generation_ends(checkpoint), tokenizer))
    outcomes = answer_examples(
        "x", load_model(checkpoint, "float32"), tokenizer, tokenize(examples, spec, tokenizer), settings, "exact"
    )
    return sum(outcome.correct for outcome in outcomes) / len(outcomes), len(outcomes)
