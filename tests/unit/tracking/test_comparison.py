"""What MLflow gets of a comparison, from a server that loses requests and answers as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from servers import Server

from transplant_ray.errors import TrackingError
from transplant_ray.organ.lessons import Learnt
from transplant_ray.recipe import CompareRecipe
from transplant_ray.tracking import outbox, tracker
from transplant_ray.tracking.comparison import ComparisonTracker

PARENT = "parent"
LEARNT = Learnt("key", "model", "full", "tune", 1e-3, 0, select=2.0)
OTHER = replace(LEARNT, key="another key", seed=1)


@pytest.fixture
def settings(tmp_path: Path) -> CompareRecipe:
    text = {"data": "text.jsonl"}
    return CompareRecipe.model_validate(
        {
            "name": "c",
            "model": {"model": "model"},
            "methods": {"full": {}},
            "training": {**text, "context": 16, "steps": 20, "share": [0.2, 1]},
            "domain": {**text, "share": [0, 0.2]},
            "general": {"data": "other.jsonl"},
            "storage": str(tmp_path),
        }
    )


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def told(server: Server, settings: CompareRecipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComparisonTracker]:
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.0)
    started = ComparisonTracker(server, "experiment", PARENT, settings, print)
    yield started
    started.outbox.close()


@pytest.mark.parametrize("trouble", ["away", "lost"])
def test_every_lesson_has_one_run_whatever_becomes_of_request_and_answer(
    server: Server, told: ComparisonTracker, trouble: str
) -> None:
    server.troubles = {"create_run": [trouble], "search_runs": ["away"], "log_batch": ["lost"]}
    told.log_learnt(LEARNT)
    told.log_learnt(OTHER)
    told.finish()
    assert sorted(run.data.tags["lesson"] for run in server.runs.values()) == sorted([LEARNT.key, OTHER.key])
    assert {status for status, _ in server.ended.values()} == {"FINISHED"}
    assert told.refused == ()


def test_a_run_that_a_slow_server_makes_after_all_is_removed(server: Server, told: ComparisonTracker) -> None:
    server.troubles = {"create_run": ["away"]}
    told.log_learnt(LEARNT)
    told.outbox.drain(60)
    (ours,) = server.runs
    late = server.do_create_run("experiment", 1, {"mlflow.parentRunId": PARENT, "lesson": LEARNT.key}, "late").info.run_id
    theirs = server.do_create_run("experiment", 1, {"mlflow.parentRunId": PARENT}, "somebody's own").info.run_id
    told.finish()
    assert set(server.runs) == {ours, theirs}
    assert late not in server.runs
    assert server.ended[PARENT][0] == "FINISHED"


def test_what_was_refused_is_said_of_the_run(server: Server, told: ComparisonTracker) -> None:
    server.troubles = {"log_batch": ["refused"]}
    told.log_learnt(LEARNT)
    told.finish()
    assert server.tags[PARENT, "incomplete"] == f"refused: 1 entry, the first: {told.refused[0]}"
    assert server.ended[PARENT][0] == "FINISHED"


def test_a_start_that_fails_leaves_no_run_that_seems_to_go_on(
    server: Server, settings: CompareRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "MlflowClient", lambda **_: server)
    server.troubles = {"log_dict": ["refused"]}
    with pytest.raises(TrackingError, match="cannot be used"):
        ComparisonTracker.start(settings, print)
    assert {id: status for id, (status, _) in server.ended.items()} == {"run-0": "FAILED"}
