"""The log of a run: what is in it, that attempts are told apart, that it keeps no secrets and ends no sweep."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.fs
import pytest

from transplant_ray.distributed.facts import (
    AtWork,
    EvaluatorDied,
    Note,
    StageBegins,
    StageEnds,
    TrialReported,
    VariantFailed,
    VariantsPlanned,
    of_shard,
)
from transplant_ray.errors import RunError, Terminated
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.pipeline.journal import LOGGER, Journal
from transplant_ray.recipe import Recipe
from transplant_ray.storage import RunFolder

RECIPE = cast(Recipe, SimpleNamespace(name="a-run", identity=lambda: "abc123"))
SAID = tuple(Outcome("v1", f"e{i}", "x", True, 3, True) for i in range(4))
SHARD = VariantShard("v1", SAID, 0.25, evaluator="e0", node="n0")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "a-run").mkdir()
    return RunFolder(tmp_path / "a-run")


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    before = LOGGER.level, list(LOGGER.handlers)
    yield
    assert (LOGGER.level, LOGGER.handlers) == before


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text().splitlines()]


def test_every_line_says_which_run_recipe_and_attempt(folder: RunFolder) -> None:
    journal = Journal(RECIPE)
    journal.hear(StageBegins("prepare", 0, "examples"))  # before the folder is the recipe's own
    with journal.kept(folder, "sweep"):
        journal.hear(StageEnds("prepare", 1.5))
    assert [line["event"] for line in lines(folder)] == ["stage begins", "sweep begins", "stage ends", "sweep ends"]
    for line in lines(folder):
        assert {"run": "a-run", "recipe": "abc123", "attempt": journal.ids["attempt"], "level": "INFO"}.items() <= line.items()
    assert [line["time"] for line in lines(folder)] == sorted(line["time"] for line in lines(folder))


def test_a_shard_is_told_with_trial_task_split_examples_and_who_did_it(folder: RunFolder) -> None:
    journal = Journal(RECIPE)
    with journal.kept(folder, "sweep"):
        journal.hear(VariantsPlanned({"v1": "lae all k=2"}))
        journal.hear(of_shard("facts", "test", SHARD))
    told = next(line for line in lines(folder) if line["event"] == "shard done")
    expected = {
        "label": "lae all k=2", "variant": "v1", "task": "facts", "split": "test", "shard": "e0+4", "examples": 4, "tokens": 12,
        "seconds": 0.25, "evaluator": "e0", "node": "n0",
    }  # fmt: skip
    assert expected.items() <= told.items()
    assert "error" not in told


def test_a_shard_that_failed_is_told_with_the_examples_it_was_asked(folder: RunFolder) -> None:
    journal = Journal(RECIPE)
    with journal.kept(folder, "sweep"):
        journal.hear(of_shard("facts", "test", VariantShard("v1", (), 0.0, "NumericsError: NaN", asked="e8+4")))
    told = next(line for line in lines(folder) if line["event"] == "shard done")
    assert {"shard": "e8+4", "examples": 0, "error": "NumericsError: NaN"}.items() <= told.items()


def test_a_recalled_shard_and_who_is_at_work_are_told_to_those_alone_who_ask(folder: RunFolder) -> None:
    recalled = of_shard("task", "select", VariantShard("v1", SAID, 0.25, recalled=True))
    for level, events in ((logging.NOTSET, set()), (logging.DEBUG, {"shard recalled", "at work"})):
        folder.log.unlink(missing_ok=True)
        LOGGER.setLevel(level)
        journal = Journal(RECIPE)
        with journal.kept(folder, "sweep"):
            journal.hear(recalled)
            journal.hear(AtWork(1, 2, 0.5))
        LOGGER.setLevel(logging.NOTSET)
        assert {line["event"] for line in lines(folder)} - {"sweep begins", "sweep ends"} == events


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError("no room"), {"exit": 2, "error": "RunError: no room"}),
        (ValueError("x" * 9999), {"exit": 1, "error": "ValueError: " + "x" * 1988}),
        (KeyboardInterrupt(), {"exit": 130, "error": "KeyboardInterrupt"}),
        (Terminated(), {"exit": 143, "error": "Terminated"}),
    ],
)
def test_how_it_ended_is_the_last_line(folder: RunFolder, error: BaseException, told: dict[str, Any]) -> None:
    def fail() -> None:
        with Journal(RECIPE).kept(folder, "sweep"):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert told.items() <= lines(folder)[-1].items()


def test_a_sweep_with_failed_variants_ends_with_the_exit_code_of_one(folder: RunFolder) -> None:
    journal = Journal(RECIPE)
    with journal.kept(folder, "sweep"):
        journal.hear(VariantFailed("v1", "NumericsError: NaN"))
        journal.exit = 1
    failed, ended = lines(folder)[-2:]
    assert (failed["event"], failed["level"], ended["exit"]) == ("variant failed", "WARNING", 1)


def test_the_next_attempt_goes_on_behind_the_last_even_where_it_was_killed_within_a_line(folder: RunFolder) -> None:
    first, second = Journal(RECIPE), Journal(RECIPE)
    with first.kept(folder, "sweep"):
        pass
    with folder.log.open("a") as file:
        file.write('{"time": "20')
    with second.kept(folder, "sweep"):
        pass
    text = folder.log.read_text().splitlines()
    assert text.pop(2) == '{"time": "20'
    attempts = [json.loads(line)["attempt"] for line in text]
    assert attempts == [first.ids["attempt"]] * 2 + [second.ids["attempt"]] * 2
    assert first.ids["attempt"] != second.ids["attempt"]


def test_no_password_of_an_address_is_in_it(folder: RunFolder) -> None:
    journal = Journal(RECIPE)
    with journal.kept(folder, "sweep"):
        journal.hear(Note("s3://someone:open-sesame@store/bucket is slow"))
        journal.hear(VariantFailed("v1", "no answer of http://someone:open-sesame@host:1/x"))
        journal.hear(EvaluatorDied("e0", ("//someone:open-sesame@host",)))
        journal.hear(TrialReported("t", "v1", 1, None, None, "//someone:open-sesame@host"))
    text = folder.log.read_text()
    assert "open-sesame" not in text
    assert text.count("//store/bucket") == text.count("http://host:1/x") == 1


def test_a_handler_of_the_users_own_gets_the_same(folder: RunFolder) -> None:
    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.getMessage(), record.__dict__["facts"]))

    heard: list[tuple[str, dict[str, Any]]] = []
    handler = Kept()
    LOGGER.addHandler(handler)
    try:
        journal = Journal(RECIPE)
        with journal.kept(folder, "rank"):
            journal.hear(Note("hello"))
    finally:
        LOGGER.removeHandler(handler)
    assert heard == [(line.pop("event"), {k: v for k, v in line.items() if k not in ("time", "level")}) for line in lines(folder)]


def test_two_sweeps_of_one_program_keep_their_logs_apart(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in ("one", "other")]
    journals = [Journal(RECIPE), Journal(RECIPE)]
    for folder in folders:
        folder.path.mkdir()
    with journals[0].kept(folders[0], "sweep"), journals[1].kept(folders[1], "sweep"):
        for journal in journals:
            journal.hear(Note("hello"))
    for journal, folder in zip(journals, folders, strict=True):
        assert [line["attempt"] for line in lines(folder)] == [journal.ids["attempt"]] * 3


def test_a_log_that_cannot_be_written_ends_nothing(folder: RunFolder) -> None:
    folder.log.mkdir()
    reached = False
    with Journal(RECIPE).kept(folder, "sweep"):
        reached = True
    assert reached
    assert list(folder.log.iterdir()) == []


def test_a_log_goes_to_where_the_results_go_and_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / "store"
    store.mkdir()
    pyarrow.fs.LocalFileSystem().create_dir(str(store / "a-run"))

    def attempt(machine: str) -> str:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        folder, journal = RunFolder.of(store.as_uri(), "a-run"), Journal(RECIPE)
        folder.path.mkdir(parents=True, exist_ok=True)
        with journal.kept(folder, "sweep"):
            journal.hear(StageEnds("evaluate", 1.0))
            assert "stage ends" in (store / "a-run" / "log.jsonl").read_text(), "sent stage by stage"
        return journal.ids["attempt"]

    attempts = [attempt(machine) for machine in ("one", "other", "one")]
    told = [json.loads(line)["attempt"] for line in (store / "a-run" / "log.jsonl").read_text().splitlines()]
    assert told == [attempt for attempt in attempts for _ in range(3)]
