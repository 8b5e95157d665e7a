"""The scripts under jobs/ that run and compare studies: their numbers again, one at a time, from made results."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import runpy
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

JOBS = Path(__file__).parents[2] / "jobs"
TARGET = "44136fa355"
NUM_MODULES, KS, NUM_EXAMPLES = 8, (2, 4, 6), 60
SKILL = {"attribution": 0.9, "lae": 0.3, "depth": 0.7, "random": 0.4, "uniform": 0.5}
"""The share of examples that a variant with all but two modules is right on."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


comparing, studying = load("compare_rankers"), load("study_pairs")


def rows_of_a_sweep() -> list[dict[str, Any]]:
    """One row a variant, as `results.parquet` has them; the last four count for no curve."""

    def row(variant: str, role: str, ranker: str | None = None, k: int | None = None, **more: Any) -> dict[str, Any]:
        shape = {"kind": "all", "alpha": 1.0, "channels": None, "penalty": None, "num_modules": NUM_MODULES if role == "all" else k}
        return {"variant": variant, "role": role, "ranker": ranker, "k": k, "split": "select", **shape, **more}

    rows = [row(TARGET, "target"), row("source", "source"), row("swapped", "all")]
    rows += [row(f"{ranker}{k}", "trial", ranker, k) for ranker in ("attribution", "lae") for k in KS]
    rows += [row(f"depth{k}", "control", "depth", k) for k in KS]
    rows += [row(f"random{k}.{seed}", "control", "random", k, seed=seed) for k in KS for seed in range(3)]
    rows += [row(f"uniform{k}", "control", "uniform", NUM_MODULES, alpha=k / NUM_MODULES + 0.01) for k in KS]
    rows += [row("gates0", "trial", "gates", None, penalty=0.0), row("gates1", "trial", "gates", None, penalty=1.0)]
    return [*rows, row("attn", "trial", "attribution", 4, kind="attn"), row("rows", "trial", "attribution", 6, channels=0.5)]


def share_right(row: dict[str, Any]) -> float:
    fixed = {"target": 0.1, "source": 0.95, "all": 0.9}
    return fixed.get(row["role"]) or 0.1 + SKILL.get(row["ranker"], 0.8) * (row["k"] or 5) / NUM_MODULES


def write_study(folder: Path, seed: int) -> Path:
    drawn, rows = random.Random(seed), rows_of_a_sweep()
    outcomes, guards = [], []
    for row in rows:
        right = [drawn.random() < share_right(row) for _ in range(NUM_EXAMPLES)]
        row["accuracy"] = fmean(right)
        outcomes += [{"variant": row["variant"], "example": str(e), "correct": r} for e, r in enumerate(right)]
        for guard in ("kept", "spared"):
            told = {"guard": guard, "split": "select", "share": drawn.random(), "held_out": guard == "spared"}
            guards.append({"variant": row["variant"], **told})
    (folder / "outcomes").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "results.parquet")
    pd.DataFrame(guards).to_parquet(folder / "guards.parquet")
    pd.DataFrame(outcomes).to_parquet(folder / "outcomes" / "select.parquet")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "pair.seed1", 1)


@pytest.fixture(scope="module")
def sweep(study: Path) -> Any:
    return comparing.Sweep(study)


@cache
def read_right(study: Path) -> dict[str, list[bool]]:
    """Variant → whether it is right, by example."""
    outcomes = pd.read_parquet(study / "outcomes" / "select.parquet")
    found: dict[str, list[bool]] = {name: [False] * NUM_EXAMPLES for name in outcomes["variant"]}
    for row in outcomes.itertuples():
        found[row.variant][int(row.example)] = row.correct
    return found


def accuracies(study: Path, examples: Sequence[int] = range(NUM_EXAMPLES)) -> dict[str, float]:
    """Variant → accuracy on these examples, some of which may be there several times."""
    return {name: sum(right[e] for e in examples) / len(examples) for name, right in read_right(study).items()}


def areas(accuracy: dict[str, float]) -> dict[str, float]:
    """Means over a fine grid from 0 to the largest K, of the line through what was measured."""

    def recovery(name: str) -> float:
        return (accuracy[name] - accuracy[TARGET]) / (accuracy["source"] - accuracy[TARGET])

    def mean_on_the_way(recoveries: list[float]) -> float:
        grid = (np.arange(600) + 0.5) * KS[-1] / 600
        return float(np.interp(grid, [0, *KS], [0, *recoveries]).mean())

    named = {"attribution": "attribution", "lae": "lae", "depth": "depth", "uniform alpha": "uniform"}
    found = {name: mean_on_the_way([recovery(f"{stem}{k}") for k in KS]) for name, stem in named.items()}
    found["random, mean"] = mean_on_the_way([fmean(recovery(f"random{k}.{seed}") for seed in range(3)) for k in KS])
    return found


def test_areas_are_means_of_recovery_on_the_way(study: Path, sweep: Any) -> None:
    found = {name: area[0] for name, area in sweep.curves("attribution").items()}
    assert found == pytest.approx(areas(accuracies(study)), abs=1e-5)


def test_intervals_are_those_of_a_bootstrap_over_the_same_examples_for_all(study: Path, sweep: Any) -> None:
    """A plain one of fewer resamples, by other draws."""
    drawn, differences = random.Random(0), []
    for _ in range(300):
        found = areas(accuracies(study, drawn.choices(range(NUM_EXAMPLES), k=NUM_EXAMPLES)))
        differences.append(found["attribution"] - max(area for name, area in found.items() if name != "attribution"))
    curves = sweep.curves("attribution")
    ours = curves["attribution"] - np.max([area for name, area in curves.items() if name != "attribution"], axis=0)
    assert len(ours) == 1 + 10_000
    low, high = np.quantile(ours[1:], (0.025, 0.975))
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=0.06)
    assert comparing.shown(ours) == f"{ours[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def test_over_runs_the_interval_is_students() -> None:
    values = [0.1, 0.25, -0.05, 0.3]
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert comparing.over_runs(values) == f"{fmean(values):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], n = 4"
    assert comparing.over_runs([0.5]) == "+0.500 [+nan, +nan], n = 1"


def test_seeds_of_a_pair_are_one_value_over_pairs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"first.seed0": 1, "first.seed1": 2, "second.seed0": 3}
    folders = {name: write_study(study.parent / name, seed) for name, seed in names.items()}
    comparing.print_areas({name: comparing.Sweep(folder) for name, folder in folders.items()}, "attribution")
    found = {}
    for name, folder in folders.items():
        of = areas(accuracies(folder))
        found[name] = of["attribution"] - max(area for other, area in of.items() if other != "attribution")
    pairs = [fmean([found["first.seed0"], found["first.seed1"]]), found["second.seed0"]]
    out = capsys.readouterr().out
    for line, values in (("runs", list(found.values())), ("pairs", pairs)):
        (mean, num) = re.findall(rf"over {line}: (\S+) .*n = (\d)", out)[0]
        assert (float(mean), int(num)) == (pytest.approx(fmean(values), abs=0.001), len(values))


def test_a_guards_share_is_the_best_of_those_that_recover_half(study: Path, sweep: Any) -> None:
    accuracy = accuracies(study)
    half = (accuracy[TARGET] + accuracy["source"]) / 2
    shares = {(row.guard, row.variant): row.share for row in pd.read_parquet(study / "guards.parquet").itertuples()}
    stems = {"gates": "gates", "uniform alpha": "uniform", "depth": "depth", "random": "random", "lae": "lae"}
    found = sweep.kept()
    assert found.keys() == {"kept", "spared"}
    for guard, ways in found.items():
        for way, stem in stems.items():
            enough = [shares[guard, name] for name in accuracy if name.startswith(stem) and accuracy[name] >= half]
            assert ways[way] == max(enough, default=None)
    assert found["kept"]["lae"] is None
    assert found["kept"]["gates"] is not None


def test_a_variant_that_failed_keeps_nothing(study: Path, tmp_path: Path) -> None:
    """It has a row and no outcomes."""
    folder = write_study(tmp_path / "failed", 1)
    results = pd.read_parquet(folder / "results.parquet")
    failed = pd.DataFrame([{**results.iloc[-1].to_dict(), "variant": "failed", "accuracy": None}])
    pd.concat([results, failed]).to_parquet(folder / "results.parquet")
    assert comparing.Sweep(folder).kept() == comparing.Sweep(study).kept()


def test_a_grid_without_merges_of_its_size_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "far", 1)
    results = pd.read_parquet(folder / "results.parquet")
    merges = results["ranker"] == "uniform"
    for left in (results[~merges], results[~merges | (results["alpha"] > 0.3)]):
        left.to_parquet(folder / "results.parquet")
        with pytest.raises(SystemExit, match=r"no uniform merge near alpha 0\.2500 for K = 2: add it to sweep\.controls\.alpha"):
            comparing.Sweep(folder).curves("attribution")


@pytest.mark.parametrize("script", ["compare_rankers", "study_pairs"])
def test_a_script_says_what_it_wants(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(JOBS / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


RECORD = {"modules": 20, "seed": 2004, "tasks": {name: {"max_new_tokens": 7} for name in ("lost", "shared", "target_only")}}


def test_a_study_has_what_the_comparison_needs(tmp_path: Path) -> None:
    made = studying.recipe(tmp_path / "pair", RECORD, "pair.seed2", tmp_path)
    assert made.sweep.k == (1, 2, 4, 8, 12, 16)  # 20 and more are the full swap
    assert all(min(abs(alpha - k / 20) for alpha in made.sweep.controls.alpha) <= comparing.NEAR for k in made.sweep.k)
    assert {"lae", "attribution"} <= set(made.rank.by)
    assert "all" in made.sweep.kind
    assert made.guards.spared == "shared"


def test_a_study_that_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps({"done": RECORD, "new": RECORD}))
    (tmp_path / "studies" / "done.seed2").mkdir(parents=True)
    (tmp_path / "studies" / "done.seed2" / "summary.json").touch()
    ran: list[str] = []

    def run(recipe: Any) -> SimpleNamespace:
        ran.append(recipe.name)
        return SimpleNamespace(winner=None)

    monkeypatch.setattr(studying, "transplant_ray", SimpleNamespace(sweep=run))
    monkeypatch.setattr(sys, "argv", ["study_pairs", str(tmp_path / "zoo"), "--storage", str(tmp_path / "studies")])
    studying.main()
    assert ran == ["new.seed2"]
