"""The public Python API: these names, and no Ray, MLflow or torch before one of them is used."""

import subprocess
import sys
from pathlib import Path

import pytest

import transplant_ray

PUBLIC = {
    "CompareRecipe", "Engine", "OrganRecipe", "Recipe", "ResidentPair", "TransplantError", "Variant", "load_compare_recipe",
    "load_organ_recipe", "load_recipe", "apply", "compare", "demo", "export", "extract", "insert", "plan", "rank", "remove", "show",
    "sweep", "sweep_organs", "train", "TrainingSpec",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(transplant_ray.__all__) == PUBLIC == set(dir(transplant_ray))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(transplant_ray, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        _ = transplant_ray.sweeep


def test_importing_package_and_command_line_loads_nothing_heavy() -> None:
    code = "import sys, transplant_ray.cli; print([name for name in ('ray', 'mlflow', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_trial_processes_load_no_torch() -> None:
    """They start beside the evaluator on a small machine; see docs/decisions/0003."""
    code = "import sys, transplant_ray.distributed.mailbox; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False False"


@pytest.mark.parametrize("module", ["preflight", "probing"])
def test_processes_load_what_they_need(module: str) -> None:
    """What looks at a node and what ranks has no model, and no actor draws an interval: most of what they would import."""
    heavy = "transformers.modeling_utils", "scipy.stats"
    code = f"import sys, transplant_ray.distributed.{module}; print(set({heavy}) & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("command", [["plan"], ["rank"], ["sweep"], ["organ", "sweep"], ["organ", "compare"]])
def test_a_bad_recipe_is_refused_before_anything_is_loaded(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("nonsense: 1\n")
    argv = [sys.executable, "-X", "importtime", "-m", "transplant_ray.cli", *command, str(tmp_path / "recipe.yaml")]
    refused = subprocess.run(argv, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "RecipeError" in refused.stderr
    imported = {line.rpartition("|")[2].strip() for line in refused.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "ray", "transformers", "mlflow"})
