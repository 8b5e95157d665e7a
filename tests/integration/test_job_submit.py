"""The scripts under jobs/, submitted to a real cluster, as `ray job submit` does it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from integration.helpers import Head, Job, Place, Swept, run_main
from mlflow import MlflowClient


def test_a_submitted_sweep_succeeds_and_leaves_its_results_in_absolute_storage(submitted: tuple[Job, Swept]) -> None:
    job, swept = submitted
    assert job.code == 0, job.log[-3000:]
    assert f"results: {swept.folder}" in job.log
    assert swept.summary["winner"]["label"] in job.log


def test_what_a_submitted_sweep_gives_to_mlflow_outlives_the_job(submitted: tuple[Job, Swept]) -> None:
    _, swept = submitted
    client = MlflowClient(swept.place.uri)
    artifacts = Path(client.get_run(swept.summary["mlflow_run"]).info.artifact_uri.removeprefix("file://"))
    assert "runtime_resources" not in artifacts.parts, f"{artifacts} is in Ray's session folder"
    assert (artifacts / "results.parquet").exists()


@pytest.mark.slow
def test_a_submitted_ranking_on_halves_of_one_gpu_is_the_one_of_two_gpus(head: Head, swept: Swept, tmp_path: Path) -> None:
    job = head.run("rank", swept.place.path / "recipe.yaml", f"storage={tmp_path}", "resources.gpus_per_model=0.5")
    assert job.code == 0, job.log[-3000:]
    ours, theirs = (pd.read_parquet(folder / "rankings.parquet") for folder in (tmp_path / "tiny", swept.folder))
    pd.testing.assert_frame_equal(ours, theirs)
    assert not (tmp_path / "tiny" / "results.parquet").exists()


FIXES = {"storage=runs": "storage=/shared/runs", "tracking.uri=sqlite:///mlflow.db": "tracking.uri=sqlite:////shared/mlflow.db"}


@pytest.mark.slow
def test_a_job_with_a_relative_path_fails_and_its_log_names_the_fix(head: Head, swept: Swept) -> None:
    job = head.run("sweep", swept.place.path / "recipe.yaml", "storage=runs")
    assert job.code == 2
    assert f"Give an absolute path on shared storage, e.g. {FIXES['storage=runs']}" in job.log


@pytest.mark.parametrize(("override", "fix"), FIXES.items())
@pytest.mark.parametrize("command", ["rank", "sweep"])
def test_no_relative_path_is_accepted_inside_a_job(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: str, override: str, fix: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray sets it in a job; a job for each would take a minute
    finished = run_main(command, place.recipe(), override)
    assert finished.code == 2
    assert f"RecipeError: `{override.partition('=')[0]}` is the relative path" in finished.err
    assert f"Give an absolute path on shared storage, e.g. {fix}" in finished.err
    assert not (place.path / "runs").exists()
