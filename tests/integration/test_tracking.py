"""What MLflow has after a sweep, straight into sqlite and through a real server; and what happens where there is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from integration.helpers import Place, Swept, folder_bytes, free_port, run_main
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from transplant_ray import Variant, load_recipe, show
from transplant_ray.pipeline import sweeping
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.tracker import Tracker

SECRET = "open-sesame"


@dataclass(frozen=True)
class Tracked:
    swept: Swept
    client: MlflowClient

    @property
    def parent(self) -> Run:
        return self.client.get_run(self.swept.summary["mlflow_run"])

    @property
    def children(self) -> list[Run]:
        parent = self.parent.info
        return list(self.client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"))

    @property
    def winner(self) -> Run:
        (run,) = [run for run in self.children if run.data.tags.get("winner") == "true"]
        return run

    def artifacts(self, run: Run, under: str = "") -> set[str]:
        listed = self.client.list_artifacts(run.info.run_id, under)
        return {path for entry in listed for path in (self.artifacts(run, entry.path) if entry.is_dir else {entry.path})}

    def download(self, run: Run, path: str, to: Path) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, path, str(to)))


@pytest.fixture(params=["swept", "served"], ids=["sqlite", "server"])
def tracked(request: pytest.FixtureRequest) -> Tracked:
    swept: Swept = request.getfixturevalue(request.param)
    return Tracked(swept, MlflowClient(swept.place.uri, swept.place.uri))


def test_the_parent_run_has_the_recipe_as_parameters_and_the_headline_as_metrics(tracked: Tracked) -> None:
    run, results = tracked.parent, tracked.swept.results
    assert run.info.status == "FINISHED"
    assert run.data.params["task.max_new_tokens"] == "4"
    assert run.data.params["target.model"] == str(tracked.swept.place.path / "target")
    for split, role in (("select", "target"), ("select", "source"), ("test", "target"), ("test", "all")):
        (accuracy,) = results.query("split == @split and role == @role")["accuracy"]
        assert run.data.metrics[f"{split}_{role}"] == accuracy
    assert run.data.metrics["test_winner"] == results.query("split == 'test' and winner")["accuracy"].item()


def test_the_parent_run_has_tables_and_figures_as_artifacts(tracked: Tracked, tmp_path: Path) -> None:
    rankers = {"lae"} if tracked.swept.summary["name"] == "tiny" else {"lae", "random", "depth"}
    assert tracked.artifacts(tracked.parent) == {
        "recipe.yaml", "environment.json", "rankings.parquet", "results.parquet", "summary.json", "figures/k_curves.png",
        "report.html", "variants.csv", "variants.tex", "guards.parquet",
        *(f"figures/scores_{ranker}.png" for ranker in rankers),
    }  # fmt: skip
    table = pd.read_parquet(tracked.download(tracked.parent, "results.parquet", tmp_path))
    pd.testing.assert_frame_equal(table, tracked.swept.results)
    for figure in tracked.download(tracked.parent, "figures", tmp_path).iterdir():
        with Image.open(figure) as image:
            image.load()
            assert len(image.getcolors(1 << 24)) > 10, f"{figure.name} is blank"


def test_the_recipe_of_the_parent_run_is_the_one_that_ran(tracked: Tracked, tmp_path: Path) -> None:
    again = load_recipe(tracked.download(tracked.parent, "recipe.yaml", tmp_path))
    assert again.identity() == tracked.swept.summary["recipe"]


def test_every_trial_is_a_child_run_with_its_point_and_its_numbers(tracked: Tracked) -> None:
    trials = tracked.swept.results.query("role == 'trial' and split == 'select'")
    runs = {
        (r.data.params["ranker"], r.data.params["kind"], int(r.data.params["k"]), float(r.data.params["alpha"])): r
        for r in tracked.children
    }
    assert len(tracked.children) == len(runs) == len(trials)
    for row in trials.itertuples():
        run = runs[(row.ranker, row.kind, row.k, row.alpha)]
        assert run.data.params["variant"] == row.variant
        if pd.isna(row.error):
            numbers = {name: getattr(row, name) for name in ("accuracy", "ci_low", "ci_high", "recovery", "n", "num_modules")}
            assert numbers.items() <= run.data.metrics.items()
            assert run.info.status == "FINISHED"
        else:
            assert "accuracy" not in run.data.metrics
            assert (run.info.status, run.data.tags["error"]) == ("FAILED", row.error)


def test_every_trial_keeps_what_is_needed_to_make_it_again(tracked: Tracked, tmp_path: Path) -> None:
    for run in tracked.children:
        folder = tmp_path / run.info.run_id
        folder.mkdir()
        described = json.loads(tracked.download(run, "variant.json", folder).read_text())
        assert Variant.from_json(described["coefficients"]).id == described["id"] == run.data.params["variant"]


def test_the_winners_checkpoint_and_delta_come_back_byte_for_byte(tracked: Tracked, tmp_path: Path) -> None:
    for name in ("checkpoint", "delta"):
        downloaded = tracked.download(tracked.winner, name, tmp_path)
        assert folder_bytes(downloaded) == folder_bytes(tracked.swept.folder / name)


def test_the_winner_is_a_registered_model_that_its_alias_downloads(tracked: Tracked, tmp_path: Path) -> None:
    name = tracked.swept.summary["name"]
    version = tracked.client.get_model_version_by_alias(name, "winner")
    assert version.run_id == tracked.winner.info.run_id
    assert tracked.swept.summary["model_version"] == f"{name}/{version.version}"
    where = tracked.client.get_model_version_download_uri(name, version.version)
    downloaded = mlflow.artifacts.download_artifacts(where, dst_path=str(tmp_path), tracking_uri=tracked.swept.place.uri)
    assert folder_bytes(Path(downloaded)) == folder_bytes(tracked.swept.folder / "checkpoint")


def test_the_test_split_is_told_of_the_winner_alone(tracked: Tracked) -> None:
    row = tracked.swept.results.query("split == 'test' and winner").iloc[0]
    assert tracked.winner.data.metrics["test_accuracy"] == row["accuracy"]
    others = [run for run in tracked.children if run.info.run_id != tracked.winner.info.run_id]
    assert not [name for run in others for name in run.data.metrics if name.startswith("test_")]


def test_a_password_in_the_address_is_nowhere_in_what_is_kept(served: Swept, tmp_path: Path) -> None:
    tracked = Tracked(served, MlflowClient(served.place.uri, served.place.uri))
    assert SECRET in served.place.uri
    for run in (tracked.parent, *tracked.children):
        assert SECRET not in f"{run.data.params} {run.data.tags}"
        (tmp_path / run.info.run_id).mkdir()
        for path in tracked.artifacts(run):
            assert SECRET.encode() not in tracked.download(run, path, tmp_path / run.info.run_id).read_bytes(), path
    for path, content in folder_bytes(served.folder).items():
        assert SECRET.encode() not in content, path
    assert SECRET not in served.finished.out + served.finished.err


@pytest.mark.parametrize(("upload", "kept"), [("delta", {"delta"}), ("none", set())])
def test_less_than_the_checkpoint_is_uploaded_where_the_recipe_says_so(swept: Swept, upload: str, kept: set[str]) -> None:
    client, run_id, version = log_winner(swept, swept.place.uri, RunFolder(swept.folder), upload)
    found = {entry.path for entry in client.list_artifacts(run_id)} - {"variant.json"}
    assert (found, version) == (kept, None)
    assert not client.search_model_versions(f"name = 'upload-{upload}'")


def test_a_checkpoint_in_a_store_of_its_own_is_registered_where_it_is(swept: Swept) -> None:
    address = swept.folder.as_uri()
    client, run_id, _ = log_winner(swept, swept.place.uri, RunFolder(swept.folder, address), "checkpoint", "by-reference")
    version = client.get_model_version_by_alias("by-reference", "winner")
    assert version.source == f"{address}/checkpoint"
    assert "checkpoint" not in {entry.path for entry in client.list_artifacts(run_id)}


def test_a_checkpoint_whose_address_the_server_refuses_is_uploaded(swept: Swept, server: str) -> None:
    folder = RunFolder(swept.folder, swept.folder.as_uri())
    client, run_id, version = log_winner(swept, server, folder, "checkpoint", "refused")
    assert "checkpoint" in {entry.path for entry in client.list_artifacts(run_id)}
    assert version is not None
    assert client.get_model_version_by_alias("refused", "winner").source.startswith("mlflow-artifacts:/")


def log_winner(
    swept: Swept, uri: str, folder: RunFolder, upload: str, name: str | None = None
) -> tuple[MlflowClient, str, str | None]:
    """Tell MLflow of the winner of a finished sweep, by another recipe; a sweep for each of these would take a minute."""
    name = name or f"upload-{upload}"
    overrides = [f"name={name}", f"tracking.upload={upload}", f"tracking.uri={uri}", f"tracking.experiment={name}"]
    tracker = Tracker.start(load_recipe(swept.folder / "recipe.yaml", overrides))
    (result,) = [row for row in show(swept.folder)[0] if row.winner and row.split == "test"]
    child = tracker.log_trial(result, json.loads((swept.folder / "checkpoint" / "variant.json").read_text()))
    version = tracker.log_winner(child, result, folder)
    tracker.finish()
    return tracker.client, child.result(), version.result()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://someone:open-sesame@127.0.0.1:{port}", "tracking.uri` http://127.0.0.1:"),
        ("sqlite:////dev/null/mlflow.db", "tracking.uri` sqlite:////dev/null/mlflow.db"),
        ("ftp-ish://somewhere", "tracking.uri` ftp-ish://somewhere"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_before_ray_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch, uri: str, words: str
) -> None:
    monkeypatch.setattr(sweeping, "connect", lambda _: pytest.fail("Ray was started"))
    before = folder_bytes(place.path)
    recipe = place.recipe(tracking={"uri": uri.format(port=free_port())})
    finished = run_main("sweep", recipe)
    assert finished.code == 2
    assert f"TrackingError: `{words}" in finished.err
    assert "Start the server, or use tracking.uri=sqlite:///mlflow.db" in finished.err
    assert SECRET not in finished.err + finished.out
    assert folder_bytes(place.path).keys() == before.keys() | {"recipe.yaml", "task.jsonl"}
