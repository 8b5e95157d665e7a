"""What a worker does with what fails and with checkpoints, and who has room for how many workers; without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stacks import make_pair
from trainings import begin

from transplant_ray.distributed import training as module
from transplant_ray.distributed.training import TrainingJob, share_out
from transplant_ray.errors import NumericsError, ResourceError, RunError, TransplantError
from transplant_ray.organ.progress import save_progress
from transplant_ray.organ.training import Point
from transplant_ray.recipe import WorkerSpec


class Board:
    """In the bulletin's place; a call is its answer."""

    def __init__(self, failure: TransplantError | None = None) -> None:
        self.failure = failure
        self.failed = SimpleNamespace(remote=lambda: self.failure is not None)
        self.fail = SimpleNamespace(remote=self._fail)

    def _fail(self, error: TransplantError) -> None:
        self.failure = error


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of two workers, of whom each fails."""
    context = SimpleNamespace(workers=2, began=0)

    def fail(*_: object) -> None:
        context.began += 1
        raise NumericsError("the loss is nan")

    monkeypatch.setattr(module, "_train", fail)
    monkeypatch.setattr(module.ray, "get", lambda answer: answer)
    monkeypatch.setattr(module.train, "get_context", lambda: SimpleNamespace(get_world_size=lambda: context.workers))
    return context


def work(board: Board) -> None:
    module._work({"job": None, "bulletin": board})


def test_a_failure_is_told_and_raised_where_others_wait_for_the_worker(context: SimpleNamespace) -> None:
    board = Board()
    with pytest.raises(NumericsError):
        work(board)
    assert isinstance(board.failure, NumericsError)
    work(board)  # as Ray tries again
    assert context.began == 1


def test_a_worker_that_is_alone_only_tells(context: SimpleNamespace) -> None:
    context.workers, board = 1, Board()
    work(board)
    assert isinstance(board.failure, NumericsError)


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    """Of which two attempts have left checkpoints, of steps 4 and 8."""
    training = begin(make_pair(tmp_path), tmp_path / "pack", checkpoint_every=4)
    for point in training.run():
        if point.step in (4, 8):
            folder = checkpoint(tmp_path, point.step)
            folder.mkdir(parents=True)
            save_progress(training, folder)
    return TrainingJob(None, training.spec, tmp_path / "pack", tmp_path, checkpoint(tmp_path, 4), 1)  # type: ignore[arg-type]  # nobody learns


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"attempt-{step // 4}" / f"checkpoint_{step}"


@pytest.mark.parametrize(("reported", "damaged", "step"), [(None, None, 4), (8, None, 8), (8, 8, 4), (None, 4, 8)])
def test_who_starts_again_goes_on_from_what_is_whole(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, reported: int | None, damaged: int | None, step: int
) -> None:
    told = None if reported is None else SimpleNamespace(path=str(checkpoint(job.folder, reported)))
    monkeypatch.setattr(module.train, "get_checkpoint", lambda: told)
    if damaged is not None:
        (checkpoint(job.folder, damaged) / "weights.safetensors").write_bytes(b"")
    progress = module._last(job)
    assert progress is not None
    assert progress.step == step


def test_who_has_nothing_to_go_on_from_begins(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.train, "get_checkpoint", lambda: None)
    assert module._last(replace(job, start=None)) is None


def test_a_checkpoint_that_ray_cannot_write_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_progress", lambda *_: None)
    monkeypatch.setattr(module.train, "report", full)
    with pytest.raises(RunError, match=r"checkpoint of step 4 cannot be written .*No space left on device.* Free space"):
        module._report(None, Point(4, 0, None, 0.0), write=True)  # type: ignore[arg-type]  # nothing is saved


# -- room -----------------------------------------------------------------------------------------------------------------


def nodes(monkeypatch: pytest.MonkeyPatch, *has: dict[str, float]) -> None:
    """A cluster of these, and one that is gone."""
    alive = [{"Alive": True, "Resources": each} for each in has]
    monkeypatch.setattr(module.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])


@pytest.mark.parametrize(
    ("workers", "threads"),
    [
        ({}, 8),  # a worker is on one node, so not the 12 of both
        ({"num": 3}, 4),
        ({"num": 2, "cpus": 4}, 4),
        ({"gpus": 1}, 1),
        ({"num": 2, "gpus": 1, "cpus": 4}, 4),
    ],
)
def test_the_cpus_are_shared_out(monkeypatch: pytest.MonkeyPatch, workers: dict[str, Any], threads: int) -> None:
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    assert share_out(WorkerSpec(**workers)) == threads


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({"num": 3, "gpus": 1}, "3 workers with 1 GPUs and 1 CPUs each do not fit.* 2 GPUs and 8 CPUs, 0 GPUs and 4 CPUs: 2 of"),
        ({"num": 4, "cpus": 4}, "4 workers with 0 GPUs and 4 CPUs each do not fit.*: 3 of them. Ask for fewer workers"),
        ({"cpus": 9}, "1 workers with 0 GPUs and 9 CPUs each do not fit.*: 0 of them"),
        ({"num": 2, "gpus": 1, "cpus": 5}, "do not fit.*: 1 of them"),
        ({"num": 13}, "13 workers with 0 GPUs and 1 CPUs each do not fit.*: 12 of them"),
    ],
)
def test_workers_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, workers: dict[str, Any], words: str) -> None:
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    with pytest.raises(ResourceError, match=words):
        share_out(WorkerSpec(**workers))


def test_a_cluster_without_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"GPU": 1.0})
    with pytest.raises(ResourceError, match="1 workers with 0 GPUs and 1 CPUs each do not fit"):
        share_out(WorkerSpec())
