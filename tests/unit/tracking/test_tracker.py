"""The tracker against a server that loses requests and answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from runs import Made, recipe
from servers import Server

from transplant_ray.errors import TrackingError
from transplant_ray.evaluate.results import Result
from transplant_ray.recipe import Recipe, load_recipe
from transplant_ray.storage import RunFolder
from transplant_ray.tracking import outbox
from transplant_ray.tracking import tracker as module
from transplant_ray.tracking.tracker import Tracker, tracked

PARENT = "parent"
ROW = Result(
    variant="abc", role="trial", ranker="lae", kind="attn", k=2, alpha=1.0, seed=None, split="select", n=40, correct=30,
    accuracy=0.75, ci_low=0.6, ci_high=0.85, tir=1.5, recovery=0.5, num_modules=2, num_parameters=200, seconds=1.0, winner=False,
    error=None,
)  # fmt: skip
OTHER = replace(ROW, k=4)


@pytest.fixture
def settings(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    tracking = {"uri": "http://me:open-sesame@host:5000", "patience": 600}
    path.write_text(yaml.safe_dump(dict(recipe(Made())) | {"tracking": tracking, "storage": "results"}))
    return load_recipe(path)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def told(server: Server, settings: Recipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.0)
    tracker = Tracker(server, "experiment", PARENT, settings)
    yield tracker
    tracker.outbox.close()


def children(server: Server) -> list[str]:
    return sorted(run.info.run_name for run in server.runs.values())


def sweep_that_raises(error: BaseException, settings: Recipe) -> None:
    with tracked(settings, print) as tracker:
        tracker.log_trial(ROW, {})
        raise error


def settled(answer: Future[Any]) -> Any:
    return answer.result(60)


@pytest.mark.parametrize("trouble", [["away"], ["lost"], ["away", "away"], ["lost", "away"]])
def test_a_run_is_made_once_whatever_becomes_of_request_and_answer(server: Server, told: Tracker, trouble: list[str]) -> None:
    server.troubles = {"create_run": [*trouble], "search_runs": ["away"], "log_batch": ["lost"], "set_terminated": ["lost"]}
    settled(told.log_trial(ROW, {}))
    settled(told.log_trial(OTHER, {}))
    told.finish()
    assert children(server) == sorted([ROW.label, OTHER.label])
    assert {server.ended[id][0] for id in server.runs} == {"FINISHED"}
    assert {id for id, _ in server.numbers} == set(server.runs)
    assert told.refused == ()


def test_numbers_that_are_sent_again_are_the_same_and_of_the_same_time(
    server: Server, told: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hang = threading.Event()
    server.troubles = {"log_batch": ["lost"]}
    monkeypatch.setattr(module, "milliseconds", lambda: 1000)
    child = told.log_trial(ROW, {})
    monkeypatch.setattr(module, "milliseconds", lambda: 9000)
    server.hang.set()
    id = settled(child)
    told.finish()
    first, second = (what for run, what in server.numbers if run == id)
    assert {metric.timestamp for metric in first["metrics"]} == {1000}
    assert [vars(metric) for metric in first["metrics"]] == [vars(metric) for metric in second["metrics"]]
    assert server.runs[id].info.start_time == server.ended[id][1] == 1000
    assert server.ended[PARENT] == ("FINISHED", 9000)


def test_a_run_that_a_slow_server_makes_after_all_is_removed(server: Server, told: Tracker) -> None:
    server.troubles = {"create_run": ["away"]}
    ours = settled(told.log_trial(ROW, {}))
    server.do_create_run("experiment", 1, {"mlflow.parentRunId": PARENT, "variant": "abc"}, ROW.label)
    theirs = server.do_create_run("experiment", 1, {"mlflow.parentRunId": PARENT}, "somebody's own").info.run_id
    told.finish()
    assert set(server.runs) == {ours, theirs}


def test_runs_are_not_looked_at_where_nothing_was_tried_again(server: Server, told: Tracker) -> None:
    server.troubles = {"search_runs": ["refused"]}
    settled(told.log_trial(ROW, {}))
    told.finish()
    assert told.refused == ()


@pytest.mark.parametrize("trouble", ["away", "lost"])
def test_a_model_version_is_made_once(server: Server, told: Tracker, tmp_path: Path, trouble: str) -> None:
    folder = RunFolder(tmp_path / "run")
    for place in (folder.checkpoint / "inner", folder.delta):
        place.mkdir(parents=True)
        (place / "weights").write_bytes(b"weights")
    server.troubles = {"create_model_version": [trouble], "set_registered_model_alias": ["lost"], "log_artifact": ["away", "lost"]}
    child = told.log_trial(ROW, {})
    version = told.log_winner(child, ROW, folder)
    told.finish()
    assert version.result() == "made/1"
    assert [(v.source, v.run_id) for v in server.versions] == [(f"store:/{child.result()}/checkpoint", child.result())]
    assert {name for _, name in server.files} == {"variant.json", "delta/weights", "checkpoint/inner/weights"}


def test_a_figure_is_sent_as_it_was(server: Server, told: Tracker, tmp_path: Path) -> None:
    figure, folder = Figure(), RunFolder(tmp_path)
    figure.savefig(tmp_path / "as it was.png")
    server.hang = threading.Event()
    told.log_summary(folder, {}, {"curve": figure}, None)
    figure.add_subplot().plot([1, 2])
    server.hang.set()
    told.drain()
    assert server.files[PARENT, "figures/curve.png"] == (tmp_path / "as it was.png").read_bytes()


def test_a_server_that_is_away_at_the_end_is_an_error_that_says_what_next(server: Server, told: Tracker) -> None:
    server.troubles = {name: ["away"] * 100_000 for name in ("create_run", "search_runs", "set_terminated")}
    told.recipe = told.recipe.model_copy(update={"tracking": told.recipe.tracking.model_copy(update={"patience": 0})})
    told.log_trial(ROW, {})
    with pytest.raises(TrackingError) as caught:
        told.finish()
    words = str(caught.value)
    assert "could not send 5 entries" in words
    assert "All results are in results/made." in words
    assert "start the server and run the same recipe again" in words
    assert "http://host:5000" in words
    assert "sesame" not in words


def test_what_was_refused_is_said_of_the_run(server: Server, told: Tracker) -> None:
    server.troubles = {"log_batch": ["refused"]}
    child = told.log_trial(ROW, {})
    told.finish()
    assert told.refused == (f"the numbers of trial {ROW.label}: a value is too long",)
    assert server.tags[PARENT, "incomplete"] == f"refused: 1 entry, the first: {told.refused[0]}"
    assert {id: status for id, (status, _) in server.ended.items()} == {child.result(): "FINISHED", PARENT: "FINISHED"}


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (SystemExit(15), "KILLED"), (RuntimeError(), "FAILED")]
)
def test_the_run_ends_as_its_block_does(
    server: Server, told: Tracker, settings: Recipe, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    monkeypatch.setattr(Tracker, "start", lambda *_: told)
    with pytest.raises(type(error)):
        sweep_that_raises(error, settings)
    assert server.ended[PARENT][0] == status
    assert children(server) == [ROW.label]


@pytest.mark.parametrize("method", ["log_batch", "log_text", "log_dict"])
@pytest.mark.parametrize("trouble", ["refused", "away"])
def test_a_start_that_fails_leaves_no_run_that_seems_to_go_on(
    server: Server, settings: Recipe, monkeypatch: pytest.MonkeyPatch, method: str, trouble: str
) -> None:
    monkeypatch.setattr(module, "MlflowClient", lambda **_: server)
    monkeypatch.setattr(module, "_reach", lambda _: None)
    server.troubles = {method: [trouble], "set_terminated": ["lost"]}
    with pytest.raises(TrackingError, match="http://host:5000: cannot be used"):
        Tracker.start(settings)
    assert {id: status for id, (status, _) in server.ended.items()} == {"run-0": "FAILED"}


def test_a_start_says_what_the_run_is_told_first(server: Server, settings: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MlflowClient", lambda **_: server)
    monkeypatch.setattr(module, "_reach", lambda _: None)
    tracker = Tracker.start(settings)
    assert server.runs[tracker.run_id].data.tags == {"transplant_ray.recipe": settings.identity()}
    assert {name for _, name in server.files} == {"recipe.yaml", "environment.json"}
    assert server.ended == {}


def test_a_server_that_hangs_keeps_nobody_who_has_pressed_ctrl_c(
    server: Server, told: Tracker, settings: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hang = threading.Event()
    monkeypatch.setattr(Tracker, "start", lambda *_: told)
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        sweep_that_raises(KeyboardInterrupt(), settings)
    assert not server.hang.is_set(), "it hung to the end"
    server.hang.set()
    while PARENT not in server.ended:
        time.sleep(0.01)
    assert server.runs.keys() <= {"run-0"}, "what waited is dropped"
    assert not server.numbers
