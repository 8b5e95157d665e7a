"""Trials of an organ sweep whose process dies come again, and are given up at last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from transplant_ray.distributed import organ_trials as module
from transplant_ray.distributed.organ_trials import ROUNDS, TrialDone, Trials, Unfit, answer_trial, run_organ_trials
from transplant_ray.errors import CheckpointError, DeviceError, NumericsError, ResourceError
from transplant_ray.organ.resident import Resident

JOB = Trials(dict.fromkeys("abc"), {}, None)  # type: ignore[arg-type]  # what a trial is, nobody asks here


class Tune:
    """Ends every trial of a round; `deaths` says in how many rounds each dies."""

    def __init__(self, **deaths: int) -> None:
        self.deaths = deaths
        self.rounds: list[list[str]] = []

    def run(self, job: Trials, _: Any) -> Iterator[TrialDone]:
        self.rounds.append(list(job.trials))
        for id in job.trials:
            died = self.deaths.get(id, 0) >= len(self.rounds)
            yield TrialDone(id, error="died" if died else None, deaths=int(died), died=died)


@pytest.mark.parametrize(
    ("deaths", "rounds", "failed"),
    [({}, ["abc"], []), ({"b": 1}, ["abc", "b"], []), ({"a": ROUNDS, "c": 1}, ["abc", "ac"], ["a"])],
)
def test_each_trial_ends_once(
    monkeypatch: pytest.MonkeyPatch, deaths: dict[str, int], rounds: list[str], failed: list[str]
) -> None:
    tune = Tune(**deaths)
    monkeypatch.setattr(module, "_run_round", tune.run)
    done = list(run_organ_trials(JOB, None))  # type: ignore[arg-type]
    assert sorted(each.id for each in done) == ["a", "b", "c"]
    assert ["".join(each) for each in tune.rounds] == rounds
    assert [each.id for each in done if each.error] == failed
    assert {each.id: each.deaths for each in done if each.deaths} == deaths


def test_a_node_that_is_unfit_ends_the_sweep_instead_of_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run through the grid, and a winner would be chosen from what is left."""
    said = [TrialDone("a"), TrialDone("b", error="ResourceError: other versions: torch.", unfit=True), TrialDone("c")]
    monkeypatch.setattr(module, "_run_round", lambda *_: iter(said))
    with pytest.raises(ResourceError, match=r"unfit for the work: ResourceError: other versions: torch\. The same command goes on"):
        list(run_organ_trials(JOB, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "unfit"), [(CheckpointError("gone"), True), (NumericsError("NaN"), False), (RuntimeError("x"), False)]
)
def test_files_that_the_driver_has_read_and_a_process_cannot_are_the_nodes_fault(
    monkeypatch: pytest.MonkeyPatch, error: Exception, unfit: bool
) -> None:
    job, resident = Trials({"a": Mock()}, {}, Mock()), Resident(torch.float32)
    monkeypatch.setattr(module, "load_tokenizer", Mock())
    for name in ("read", "model"):
        monkeypatch.setattr(resident, name, Mock(side_effect=error))
    if unfit:
        with pytest.raises(Unfit, match="gone"):
            answer_trial(job, "a", resident)
    else:
        assert answer_trial(job, "a", resident) == ([], f"{type(error).__name__}: {error}")


def test_a_model_that_cannot_be_made_of_them_is_its_trials_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    job, resident = Trials({"a": Mock()}, {}, Mock()), Resident(torch.float32)
    for name in ("load_tokenizer", "read_tokenizer"):
        monkeypatch.setattr(module, name, Mock())
    for name, does in (("read", Mock()), ("model", Mock(side_effect=CheckpointError("no such layer")))):
        monkeypatch.setattr(resident, name, does)
    assert answer_trial(job, "a", resident) == ([], "CheckpointError: no such layer")
    monkeypatch.setattr(module, "check_devices", Mock(side_effect=DeviceError("no longer computes")))
    with pytest.raises(DeviceError):
        answer_trial(job, "a", resident)


def test_an_error_of_ours_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_round", lambda job, _: iter(TrialDone(id, error="NumericsError") for id in job.trials))
    assert [each.error for each in run_organ_trials(JOB, None)] == ["NumericsError"] * 3  # type: ignore[arg-type]
