"""A sweep of the tiny pair, end to end: files, rows, numbers, winner, checkpoint."""

from __future__ import annotations

from itertools import product
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from integration.helpers import RESULT_COLUMNS, SPLIT, Swept, folder_bytes, plain_completion, weight_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from transplant_ray import Variant, apply, export, load_recipe, sweep
from transplant_ray.errors import RunError
from transplant_ray.evaluate.example import Example
from transplant_ray.evaluate.task import load_task
from transplant_ray.graft.export import changed_tensors
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import compare
from transplant_ray.models.loading import load_tensors

GRID = {"attn": (2, 6, 12), "all": (2, 6, 16)}
"""kind → K of the recipe; there are 12 attention modules, so 16 of them are clipped to 12."""


def examples(swept: Swept, split: str) -> dict[str, Example]:
    task = load_task(load_recipe(swept.folder / "recipe.yaml").task)
    return {example.id: example for example in task[split]}  # type: ignore[index]


def select_rows(swept: Swept) -> pd.DataFrame:
    results = swept.results
    return results[results["split"] == "select"]


def test_a_sweep_writes_the_files_of_the_recipe(swept: Swept) -> None:
    assert {path.name for path in swept.folder.iterdir() if not path.name.startswith(".")} == {
        "recipe.yaml", "rankings.parquet", "results.parquet", "summary.json", "outcomes", "checkpoint", "delta", "report.html",
        "variants.csv", "variants.tex", "variants.parquet", "examples.parquet", "guards.parquet", "modules.parquet", "log.jsonl",
    }  # fmt: skip
    assert list(swept.results.columns) == RESULT_COLUMNS


def test_every_baseline_trial_and_control_is_a_row_on_select(swept: Swept) -> None:
    points = [(kind, k) for kind, ks in GRID.items() for k in ks]
    expected = [
        ("target", None, None, None, None, None),
        ("source", None, None, None, None, None),
        ("all", None, None, None, None, None),
    ]
    expected += [("trial", "lae", kind, k, 1.0, None) for kind, k in points]
    expected += [("control", "depth", kind, k, 1.0, None) for kind, k in points]
    expected += [("control", "random", kind, k, 1.0, seed) for (kind, k), seed in product(points, range(3))]
    matched = round(select_rows(swept).query("winner")["moved"].iloc[0], 4)  # the merge that moves as much as the winner
    expected += [("control", "uniform", "all", 21, alpha, None) for alpha in (0.25, 0.5, 0.75, matched)]
    keys = select_rows(swept)[["role", "ranker", "kind", "k", "alpha", "seed"]].astype(object)
    found = [tuple(None if pd.isna(value) else value for value in row) for row in keys.itertuples(index=False)]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_on_test_there_are_the_baselines_the_winner_and_its_match_and_nothing_else(swept: Swept) -> None:
    results = swept.results
    test = results[results["split"] == "test"]
    assert sorted(test["role"]) == ["all", "control", "source", "target", "trial"]
    assert set(results["split"]) == {"select", "test"}
    assert set(results["n"].where(results["split"] == "select").dropna()) == {SPLIT["select"]}
    assert set(test["n"]) == {SPLIT["test"]}


def test_rows_of_equal_variants_have_equal_numbers(swept: Swept) -> None:
    numbers = ["variant", "correct", "accuracy", "num_modules", "num_parameters"]
    rows = select_rows(swept)[numbers].drop_duplicates()
    assert rows["variant"].is_unique
    assert len(rows) < len(select_rows(swept))  # clipped and equal sets are there, or this shows nothing


@pytest.mark.parametrize("split", ["select", "test"])
def test_metrics_follow_from_the_recorded_completions(swept: Swept, split: str) -> None:
    outcomes = pd.read_parquet(swept.folder / "outcomes" / f"{split}.parquet")
    asked = examples(swept, split)
    right = outcomes["completion"].str.strip() == outcomes["example"].map(lambda id: asked[id].answer.strip())
    assert (right == outcomes["correct"]).all()
    accuracy = right.groupby(outcomes["variant"]).mean()
    assert (right.groupby(outcomes["variant"]).size() == len(asked)).all()
    rows = swept.results.query("split == @split")
    target, source = (float(rows.loc[rows["role"] == role, "accuracy"].iloc[0]) for role in ("target", "source"))
    assert 0 < target < source < 1
    for row in rows.itertuples():
        measured = accuracy["exported" if (split, row.role) == ("test", "trial") else row.variant]
        assert row.accuracy == pytest.approx(measured)
        assert row.tir == pytest.approx(measured / target)
        assert row.recovery == pytest.approx((measured - target) / (source - target))
        assert (row.ci_low, row.ci_high) == pytest.approx(wilson(measured, row.n), abs=1e-9)


def wilson(p: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """As in every textbook."""
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_all_swapped_is_the_source_where_only_linear_maps_differ(swept: Swept) -> None:
    outcomes = pd.read_parquet(swept.folder / "outcomes" / "select.parquet").set_index(["variant", "example"])["completion"]
    everything = select_rows(swept).query("role == 'all'")["variant"].item()
    assert outcomes[everything].sort_index().equals(outcomes["source"].sort_index())


def test_the_winner_is_the_smallest_k_within_one_standard_error_of_the_best_trial(swept: Swept) -> None:
    select = select_rows(swept)
    trials = select[select["role"] == "trial"]
    best = trials["accuracy"].max()
    close = trials[trials["accuracy"] >= best - sqrt(best * (1 - best) / SPLIT["select"])]
    fewest = close[close["k"] == close["k"].min()].sort_values("num_parameters").iloc[0]
    assert list(select[select["winner"]].index) == [fewest.name]
    assert swept.summary["winner"]["variant"] == fewest["variant"]
    assert set(swept.results.query("winner")["split"]) == {"select", "test"}


def test_the_checkpoint_says_in_plain_transformers_what_was_recorded(swept: Swept) -> None:
    model = AutoModelForCausalLM.from_pretrained(swept.folder / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(swept.folder / "checkpoint")
    outcomes = pd.read_parquet(swept.folder / "outcomes" / "test.parquet").query("variant == 'exported'")
    asked = examples(swept, "test")
    said = [plain_completion(model, tokenizer, asked[id].prompt) for id in outcomes["example"]]
    assert said == list(outcomes["completion"])
    assert len(set(said)) > 5
    agrees = swept.summary["winner"]["exported_agrees"]
    assert agrees == {"n": SPLIT["select"], "equal": SPLIT["select"]}


def test_rankings_order_all_modules_by_score(swept: Swept) -> None:
    rankings = pd.read_parquet(swept.folder / "rankings.parquet")
    assert set(rankings["ranker"]) == {"lae"}
    assert list(rankings["rank"]) == list(range(1, 22))
    assert rankings["score"].is_monotonic_decreasing
    assert np.isfinite(rankings["score"]).all()
    assert rankings["module"].is_unique


def test_a_recipe_of_the_same_name_is_refused_and_the_folder_stays_as_it_was(swept: Swept) -> None:
    before = folder_bytes(swept.folder)
    recipe = load_recipe(swept.place.recipe(), ["sweep.k=[1]"])
    with pytest.raises(RunError, match=r"runs/tiny: holds the results of another recipe.*`name` or `storage`"):
        sweep(recipe)
    assert folder_bytes(swept.folder) == before


def test_any_variant_is_exported_from_the_run_as_it_would_be_afresh(swept: Swept, tmp_path: Path) -> None:
    loser = select_rows(swept).query("role == 'control' and ranker == 'uniform' and alpha == 0.25")["variant"].item()
    out = export(swept.folder, variant=loser, out=tmp_path / "out")
    comparison = compare(*(open_checkpoint(str(swept.place.path / name)) for name in ("source", "target")))
    fresh = changed_tensors(comparison, Variant.uniform(comparison.pairs, 0.25))
    written = open_checkpoint(str(out))
    for name, tensor in load_tensors(written, written.tensors).items():
        expected = fresh[name]() if name in fresh else load_tensors(comparison.target, [name])[name]
        assert tensor.equal(expected), name
    assert set(fresh) == {name for pair in comparison.pairs.values() for name in (pair.target.disk_weight,)}


def test_the_winner_exported_again_has_the_bytes_of_the_runs_checkpoint(swept: Swept, tmp_path: Path) -> None:
    out = export(swept.folder, out=tmp_path / "out")
    assert weight_bytes(out) == weight_bytes(swept.folder / "checkpoint")


def test_an_unknown_variant_is_refused_with_the_nearest(swept: Swept, tmp_path: Path) -> None:
    variant = str(swept.summary["winner"]["variant"])
    near = variant[:-1] + ("0" if variant[-1] != "0" else "1")
    with pytest.raises(RunError, match=f"{near}.*Did you mean {variant}"):
        export(swept.folder, variant=near, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_runs_delta_makes_the_checkpoint_and_takes_it_back(swept: Swept, tmp_path: Path) -> None:
    target = swept.place.path / "target"
    made = apply(swept.folder / "delta", str(target), tmp_path / "made")
    assert weight_bytes(made) == weight_bytes(swept.folder / "checkpoint")
    assert weight_bytes(made) != weight_bytes(target)
    undone = apply(swept.folder / "delta", str(made), tmp_path / "undone", undo=True)
    assert weight_bytes(undone) == weight_bytes(target)


def test_variants_that_overflow_are_rows_with_their_reason_and_no_number(served: Swept) -> None:
    results = served.results
    failed = results[results["error"].notna()]
    assert {("trial", "depth", 1), ("control", "depth", 1)} <= set(zip(failed["role"], failed["ranker"], failed["k"], strict=True))
    assert failed["error"].str.contains(r"NaN logits.*`resources\.dtype").all()
    assert failed[["correct", "accuracy", "ci_low", "ci_high", "tir", "recovery"]].isna().all(axis=None)
    assert {row["variant"] for row in served.summary["failed"]} == set(failed["variant"])


def test_the_winner_is_chosen_among_variants_that_did_not_fail(served: Swept) -> None:
    results = served.results
    well = results[results["error"].isna()]
    assert well["accuracy"].notna().all()
    assert {"target", "source", "all", "trial", "control"} == set(well["role"])
    assert list(well.loc[well["winner"], "split"]) == ["select", "test"]


def test_a_sweep_with_failed_variants_ends_with_1_and_says_which(served: Swept) -> None:
    assert served.finished.code == 1, served.finished.err
    assert "failed" in served.finished.out
    assert "depth ffn k=1" in served.finished.out


def test_trials_cover_ranker_kind_k_and_alpha(served: Swept) -> None:
    trials = served.results.query("role == 'trial' and split == 'select'")
    found = set(zip(trials["ranker"], trials["kind"], trials["k"], trials["alpha"], strict=True))
    assert found == set(product(("lae", "random", "depth"), ("ffn",), (1, 3), (0.5, 1.0)))
    assert len(trials) == len(found)
