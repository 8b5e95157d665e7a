"""`organ compare` with the real Ray and MLflow: the command line, a tutor that is killed, a driver that is told to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import ray
import yaml
from integration.helpers import Finished, Place, run_main
from mlflow import MlflowClient
from stacks import save_model
from trainings import sums

from transplant_ray.distributed.facts import Fact, StepsDone
from transplant_ray.organ.folder import open_organ
from transplant_ray.pipeline.comparing import compare
from transplant_ray.recipe import load_compare_recipe

METHODS = {"organ": {"layers": "0"}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers and two texts."""
    folder = tmp_path_factory.mktemp("compare")
    save_model(folder / "model", num_hidden_layers=2)
    for name, seed in (("domain", 0), ("general", 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in sums(80, seed)))
    return folder


def write(folder: Path, place: Path, uri: str, **changes: Any) -> Path:
    settings = {
        "name": "tiny",
        "model": {"model": str(folder / "model")},
        "training": {"data": str(folder / "domain.jsonl"), "share": [0.5, 1], "context": 16, "steps": 4, "batch": 4},
        "methods": METHODS,
        "tune": {"lr": [1e-3, 1e25]},
        "seeds": [0, 1],
        "domain": {"data": str(folder / "domain.jsonl"), "share": [0, 0.5], "contexts": 3},
        "general": {"data": str(folder / "general.jsonl"), "contexts": 3},
        "tracking": {"uri": uri, "experiment": place.name},
        "storage": str(place / "runs"),
    }
    path = place / "compare.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def test_the_command_line_from_recipe_to_report(cluster: None, folder: Path, template: Place, tmp_path: Path) -> None:  # noqa: ARG001
    path = write(folder, tmp_path, template.uri)
    planned = run_main("organ", "compare", path, "--dry-run")
    assert planned.code == 0, planned.err
    assert "in all 8 trainings, 2,048 tokens. Nothing was written." in planned.out
    assert not (tmp_path / "runs").exists()

    finished: Finished = run_main("organ", "compare", path)
    assert finished.code == 0, finished.err  # a rate of 1e25 diverges, for both; that is a result
    assert "organ, lr 1e+25, seed 1000 failed" in " ".join(finished.out.split())
    run = tmp_path / "runs" / "tiny"
    assert open_organ(run / "shipped" / "model-organ-1").manifest.training is not None
    assert (run / "shipped" / "model-lora-0" / "adapter_model.safetensors").is_file()
    results = pd.read_parquet(run / "results.parquet")
    assert list(results.stage) == ["before"] + 2 * ["tune"] + 2 * ["tune"] + 4 * ["confirm"]
    assert results[results.stage == "confirm"].domain_perplexity.notna().all()

    client = MlflowClient(tracking_uri=template.uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    assert parent.info.status == "FINISHED"
    children = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 9
    assert sorted(each.info.status for each in children) == 2 * ["FAILED"] + 7 * ["FINISHED"]
    assert {"report.html", "results.parquet", "comparison.tex"} <= {each.path for each in client.list_artifacts(parent.info.run_id)}
    confirmed = next(each for each in children if each.data.params.get("stage") == "confirm")
    assert [metric.step for metric in client.get_metric_history(confirmed.info.run_id, "lr")] == [0, 1, 2, 3, 4]


class Killer:
    """Kills the tutors once one of them has come to a step."""

    def __init__(self, step: int) -> None:
        self.step, self.killed = step, 0

    def stage(self, name: str, total: int, unit: str = "examples") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None: ...

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, StepsDone) and fact.step >= self.step and not self.killed:
            for process in psutil.Process().children(recursive=True):
                if any(word.startswith("ray::Tutor") for word in process.cmdline()):
                    process.kill()
                    self.killed += 1


LONG = {"steps": 400, "batch": 4, "context": 16, "share": [0.5, 1], "checkpoint_every": 20}


@pytest.mark.slow
def test_tutors_that_are_killed_come_back_and_nothing_is_trained_twice(
    cluster: None,  # noqa: ARG001
    folder: Path,
    template: Place,
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"methods": {"full": {}}, "tune": {"lr": [1e-3]}, "seeds": [0]}
    changes["training"] = {"data": str(folder / "domain.jsonl"), **LONG}
    recipes = []
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
        recipes.append(load_compare_recipe(write(folder, tmp_path / name, template.uri, **changes)))
    calm, killer = compare(recipes[0]), Killer(100)
    found = compare(recipes[1], killer)
    assert killer.killed
    assert found.failed == ()
    weights = [tmp_path / name / "runs" / "tiny" / "shipped" / "model-full-0" / "model.safetensors" for name in ("calm", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert found.findings.choices == calm.findings.choices
    again = compare(recipes[1])
    assert again.summary["recalled"] == 2


@pytest.mark.slow
def test_a_driver_that_is_told_to_stop_says_so_and_the_same_command_goes_on(
    cluster: None,  # noqa: ARG001
    folder: Path,
    template: Place,
    tmp_path: Path,
) -> None:
    training = {"data": str(folder / "domain.jsonl"), **LONG}
    path = write(folder, tmp_path, template.uri, training=training, methods={"full": {}}, tune={"lr": [1e-3, 2e-3]}, seeds=[0])
    address = f"resources.address={ray.get_runtime_context().gcs_address}"
    command = [sys.executable, "-m", "transplant_ray.cli", "organ", "compare", str(path), address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("runs/tiny/lessons/*/checkpoint_*/progress.json")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM; the same command goes on where it stopped" in said
    assert not (tmp_path / "runs" / "tiny" / "summary.json").exists()
    finished = run_main("organ", "compare", path)
    assert finished.code == 0, finished.err
