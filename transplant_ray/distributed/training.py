"""A training as Ray Train runs it: workers that die are replaced and go on from the last checkpoint.

What the workers say on the way goes through a bulletin that the driver reads; what must outlive them is in checkpoints.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
import transformers
from ray import train
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transplant_ray.distributed.bulletin import Bulletin
from transplant_ray.errors import ResourceError, RunError, TransplantError
from transplant_ray.organ.learners import Learner
from transplant_ray.organ.pack import Pack
from transplant_ray.organ.progress import Progress, latest_progress, read_progress, save_progress
from transplant_ray.organ.training import Point, Rank, Training
from transplant_ray.recipe import TrainingSpec, WorkerSpec

POLL_SECONDS = 0.5
KEPT = 2
"""Checkpoints; the one before the last is there for the case that the last was not written to its end."""
ATTEMPT, CHECKPOINT = "attempt-", "checkpoint_"


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs to know; paths are absolute, for workers run in a folder of Ray's."""

    learner: Learner
    spec: TrainingSpec
    pack: Path
    folder: Path
    """Of the checkpoints: all workers and the driver see it."""
    start: Path | None
    """The checkpoint of an earlier attempt to go on from."""
    num_threads: int


def find_progress(folder: Path) -> Progress | None:
    """The furthest whole checkpoint of all attempts at a training."""
    return latest_progress(folder.glob(f"{ATTEMPT}*/{CHECKPOINT}*"))


def share_out(workers: WorkerSpec) -> int:
    """Threads of each worker. ResourceError where the cluster has no room for them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = workers.cpus or (1 if workers.gpus else max(1, int(sum(has.get("CPU", 0) for has in nodes)) // workers.num))
    if workers.cpus is None and not workers.gpus:  # a worker is on one node
        cpus = max(1, min(cpus, int(max((has.get("CPU", 0) for has in nodes), default=0))))
    room = sum(_room(has, cpus, workers.gpus) for has in nodes)
    if room < workers.num:
        had = ", ".join(f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs" for has in nodes)
        raise ResourceError(
            f"{workers.num} workers with {workers.gpus} GPUs and {cpus} CPUs each do not fit; the cluster's nodes have {had}: "
            f"{room} of them. Ask for fewer workers, or join a larger cluster with `address`."
        )
    return cpus


def _room(has: dict[str, float], cpus: int, gpus: int) -> int:
    by_cpu = int(has.get("CPU", 0) // cpus)
    return min(by_cpu, int(has.get("GPU", 0) // gpus)) if gpus else by_cpu


def run_training(job: TrainingJob, workers: WorkerSpec, on_point: Callable[[Point], None], note: Callable[[str], None]) -> Progress:
    """Train to the end and return the last checkpoint; each point once, in order, though a worker may have died in between.

    Our own errors come as they were raised in a worker; RunError where workers died more often than is put up with.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    bulletin = Bulletin.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # what the decorator adds
    trainer = _trainer(job, workers, bulletin)
    ended: list[BaseException | None] = []
    thread = threading.Thread(target=_fit, args=(trainer, ended), name="training", daemon=True)  # so that Ctrl-C stays ours
    thread.start()
    reader = _Reader(bulletin, on_point, note)
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        reader.read()
    reader.read()
    if reader.failure is not None:
        raise reader.failure
    if ended[0] is not None:
        raise RunError(
            f"the training ended early: {_reason(ended[0])}. The same command goes on from its last checkpoint."
        ) from ended[0]
    last = find_progress(job.folder)
    if last is None or last.step < job.spec.num_steps:
        raise RunError(f"{job.folder}: the last checkpoint is not there. The same command goes on from the one before.")
    return last


def _fit(trainer: TorchTrainer, ended: list[BaseException | None]) -> None:
    try:
        trainer.fit()
        ended.append(None)
    except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
        ended.append(error)


class _Reader:
    def __init__(self, bulletin: ActorHandle, on_point: Callable[[Point], None], note: Callable[[str], None]) -> None:
        self.bulletin, self.on_point, self.note = bulletin, on_point, note
        self.read_points, self.step, self.starts = 0, -1, 0
        self.failure: TransplantError | None = None

    def read(self) -> None:
        points, starts, self.failure = ray.get(self.bulletin.read.remote(self.read_points))
        self.read_points += len(points)
        if starts > max(1, self.starts):
            self.note("a worker died; the training goes on from its last checkpoint")
        self.starts = starts
        for point in (Point(**said) for said in points):
            if point.step > self.step:  # after a death steps come again, and give the same
                self.step = point.step
                self.on_point(point)


def _trainer(job: TrainingJob, workers: WorkerSpec, bulletin: ActorHandle) -> TorchTrainer:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a busy machine imports torch for minutes
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # so long a worker waits at every checkpoint
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    number = sum(1 for _ in job.folder.glob(f"{ATTEMPT}*"))
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "bulletin": bulletin},
        scaling_config=train.ScalingConfig(
            num_workers=workers.num,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": job.num_threads, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=train.RunConfig(
            name=f"{ATTEMPT}{number}",
            storage_path=str(job.folder),
            failure_config=train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=KEPT),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What every worker does. An error of ours would come again however often it is tried: it is told, and the work ends.

    Where several work it is raised too, for the others wait in a collective for ever, and only Ray can end them. Those that it
    starts in their place find that it was told, and end.
    """
    job, bulletin = config["job"], config["bulletin"]
    if ray.get(bulletin.failed.remote()):
        return
    try:
        _train(job, bulletin)
    except TransplantError as error:
        ray.get(bulletin.fail.remote(error))
        if train.get_context().get_world_size() > 1:
            raise


def _train(job: TrainingJob, bulletin: ActorHandle) -> None:
    torch.set_num_threads(job.num_threads)
    transformers.logging.set_verbosity_error()
    context = train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), get_device())
    training = Training(job.learner.load(job.spec.seed), Pack.open(job.pack), job.spec, rank)
    if progress := _last(job):
        progress.restore(training)
    first = rank.number == 0
    if first:
        bulletin.begin.remote()
    for point in training.run():
        if first:
            bulletin.post.remote(point.to_json())
        if training.is_due(point):
            _report(training, point, write=first)


def _last(job: TrainingJob) -> Progress | None:
    """What Ray was told last; where that was damaged since, the furthest that is whole, of this attempt or an earlier one."""
    reported = train.get_checkpoint()
    folder = job.start if reported is None else Path(reported.path)
    return None if folder is None else read_progress(folder) or find_progress(job.folder)


def _report(training: Training, point: Point, *, write: bool) -> None:
    """A barrier for all workers; the first one writes. RunError where there is no room."""
    if not write:
        train.report({"step": point.step})
        return
    with TemporaryDirectory(prefix="transplant_ray-") as folder:
        save_progress(training, Path(folder))
        try:
            train.report({"step": point.step}, checkpoint=train.Checkpoint.from_directory(folder))
        except OSError as error:  # Ray copies it to where all workers see it
            raise RunError(
                f"the checkpoint of step {point.step} cannot be written ({error}). Free space and run it again."
            ) from error


def _reason(error: BaseException) -> str:
    failures: Iterable[BaseException] = getattr(error, "worker_failures", {}).values() or [error]
    return "; ".join(dict.fromkeys((str(each).strip().splitlines() or [repr(each)])[-1][:300] for each in failures))
