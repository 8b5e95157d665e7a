"""Trials of an organ sweep whose process dies come again, and are given up at last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from transplant_ray.distributed import organ_trials as module
from transplant_ray.distributed.organ_trials import ROUNDS, TrialDone, Trials, run_organ_trials

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


def test_an_error_of_ours_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_round", lambda job, _: iter(TrialDone(id, error="NumericsError") for id in job.trials))
    assert [each.error for each in run_organ_trials(JOB, None)] == ["NumericsError"] * 3  # type: ignore[arg-type]
