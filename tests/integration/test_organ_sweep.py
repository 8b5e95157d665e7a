"""Organ sweeps by the real Ray Tune into a real MLflow database: calm, with a process killed, again, and with a changed organ."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from integration.helpers import Finished, Place, run_main
from mlflow import MlflowClient
from stacks import save_model, trained_copy
from trainings import sums

from transplant_ray.distributed.facts import Fact
from transplant_ray.organ.folder import open_organ
from transplant_ray.pipeline.organ_sweeping import sweep_organs
from transplant_ray.pipeline.organs import extract
from transplant_ray.recipe import load_organ_recipe


@dataclass
class Swept:
    folder: Path
    """With `model`, `organ`, `text.jsonl` and the recipe."""
    finished: Finished
    uri: str

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "runs" / "tiny" / "summary.json").read_text())
        return summary

    @property
    def results(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "runs" / "tiny" / "results.parquet")

    def run(self, *overrides: str) -> Finished:
        storage = f"storage={self.folder / 'runs'}"
        return run_main("organ", "sweep", self.folder / "recipe.yaml", storage, f"tracking.uri={self.uri}", *overrides)


@dataclass
class Killer:
    """Kills the trial process once, when the first model has answered."""

    notes: list[str] = field(default_factory=list)
    killed: int = 0

    def stage(self, name: str, total: int, unit: str = "examples") -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def hear(self, fact: Fact) -> None: ...

    def advance(self, amount: int) -> None:  # noqa: ARG002
        if not self.killed:
            for process in trial_processes():
                process.kill()
                self.killed += 1


def trial_processes() -> list[psutil.Process]:
    """Those of the Ray that this process has started."""
    return [process for process in psutil.Process().children(recursive=True) if "OrganTrial" in "".join(process.cmdline())]


pytestmark = pytest.mark.slow  # each trial's process imports torch; the verb without Ray is in unit/pipeline/test_organ_sweeping.py


@pytest.fixture(scope="module")
def swept(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    """Through the command line."""
    folder = tmp_path_factory.mktemp("organs")
    save_model(folder / "model")
    trained_copy(extract(str(folder / "model"), "1-2", folder / "before"), folder / "organ")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sums(80)))
    recipe = {
        "name": "tiny", "recipient": {"model": "model"}, "organs": {"a": "organ"}, "context": 16,
        "sweep": {"positions": [1, 4], "modes": ["insert"]},
        "domain": {"data": "text.jsonl", "share": [0, 0.5], "contexts": 6},
        "general": {"data": "text.jsonl", "share": [0.5, 1], "contexts": 6},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = Swept(folder, Finished(0, "", ""), template.uri)
    finished = made.run()
    assert finished.code == 0, finished.err
    return Swept(folder, finished, template.uri)


def test_every_place_is_measured_and_the_winner_is_a_checkpoint(swept: Swept) -> None:
    results = swept.results
    assert sorted(results[results.split == "select"].label) == [
        "a alone", "a insert 1", "a insert 4", "a untrained insert 1", "a untrained insert 4", "recipient",
    ]  # fmt: skip
    assert results.error.isna().all()
    assert swept.summary["confirmed"]["exported_agrees"]["equal"] == 12
    folder = swept.folder / "runs" / "tiny"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "checkpoint", "log.jsonl", "outcomes", "recipe.yaml", "report.html", "results.parquet", "summary.json", "tasks.parquet",
        "variants.csv",
        "variants.tex",
    ]  # fmt: skip
    assert sorted(path.name for path in (swept.folder / "runs").iterdir() if path.name.startswith(".tiny")) == []
    assert swept.summary["verdict"]["conclusion"] in swept.finished.out


def test_mlflow_has_a_run_for_every_model_and_the_winner(swept: Swept) -> None:
    client = MlflowClient(tracking_uri=swept.uri)
    parent = client.get_run(swept.summary["mlflow_run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"] == swept.summary["verdict"]["conclusion"]
    experiment = parent.info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    results = swept.results
    select = results[results.split == "select"].set_index("label")
    assert {run.info.run_name for run in children} == set(select.index)
    for run in children:
        assert run.data.metrics["domain_loss"] == pytest.approx(select.domain_loss[run.info.run_name])
    (winner,) = [run for run in children if run.data.tags.get("winner") == "true"]
    assert winner.info.run_name == swept.summary["winner"]
    assert swept.summary["model_version"] == "tiny/1"
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "results.parquet", "summary.json", "recipe.yaml", "figures"} <= names


def test_the_same_again_measures_nothing_and_says_so(swept: Swept) -> None:
    before = swept.results
    finished = swept.run()
    assert finished.code == 0
    assert swept.summary["measured"] == 0
    assert "were taken from the ledger of this storage, 0 are new" in finished.out
    pd.testing.assert_frame_equal(swept.results, before)


def test_a_process_that_is_killed_comes_again_and_changes_no_number(swept: Swept, tmp_path: Path) -> None:
    recipe = load_organ_recipe(swept.folder / "recipe.yaml", [f"storage={tmp_path}", f"tracking.uri={swept.uri}", "name=killed"])
    killer = Killer()
    result = sweep_organs(recipe, killer)
    assert killer.killed
    assert result.failed == []
    ours = {(row.label, row.split): (row.domain_loss, row.general_loss) for row in result.results}
    theirs = {(row.label, row.split): (row.domain_loss, row.general_loss) for row in swept.results.itertuples()}
    assert ours == theirs


def test_a_changed_organ_is_measured_anew_and_nothing_else(swept: Swept, tmp_path: Path) -> None:
    shutil.copytree(swept.folder / "before", tmp_path / "before")
    trained_copy(extract(str(swept.folder / "model"), "1-2", tmp_path / "cut"), tmp_path / "once")
    shutil.rmtree(swept.folder / "organ")
    trained_copy(open_organ(tmp_path / "once"), swept.folder / "organ", earlier=open_organ(tmp_path / "once").manifest.training)
    assert swept.run("tracking.upload=none").code == 0
    blocks = 12 * (2 + 1)  # two places and the organ alone; the recipient and untrained layers are known
    confirmed = 24  # the new checkpoint, both halves; the test halves of the others, where the winner is elsewhere
    assert blocks + confirmed <= swept.summary["measured"] <= blocks + confirmed + 12
