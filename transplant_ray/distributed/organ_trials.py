"""The grid of an organ sweep as Ray Tune runs it: a trial makes its model of resident layers and answers for it.

A process serves one trial after another and reads each weight once. One that dies, or whose device fails, is started again, and
so is its trial; an error of ours is the trial's result, for it would come again. A process that finds other weights or libraries
than the driver's ends all of it: what it cannot do is no trial's fault, and it would run through the grid.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from ray import tune

from transplant_ray.distributed.actors import Workload, who
from transplant_ray.distributed.cluster import GONE, Capacity
from transplant_ray.distributed.meters import count_in_evaluator
from transplant_ray.distributed.probing import Asked
from transplant_ray.distributed.room import ACCELERATOR, SHARE
from transplant_ray.distributed.tuning import Listener, make_tuner
from transplant_ray.errors import CheckpointError, DeviceError, NumericsError, ResourceError, RunError, TransplantError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.models.loading import check_devices, load_tokenizer, placement, read_tokenizer
from transplant_ray.organ.grid import Trial
from transplant_ray.organ.resident import Resident

MAX_FAILURES = 2
"""Deaths of the process under one trial, in one round, after which Tune gives it up."""
ROUNDS = 2
"""In which trials whose process died are tried: Tune also gives one up early, where two calls were under way to the process."""
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0
"""For Tune to end its processes where the trials are left early; it gives them 10 to end by themselves."""
Said = Sequence[tuple[str, Split, VariantShard]]
"""Task, split, and what was answered."""


@dataclass(frozen=True)
class Trials:
    """All that a process needs to know; paths are absolute, for it runs in a folder of Ray's."""

    trials: Mapping[str, Trial]
    """By their ids."""
    asked: Mapping[str, Sequence[Asked]]
    """What each of them has not answered yet."""
    workload: Workload


@dataclass(frozen=True)
class TrialDone:
    id: str
    said: Said = ()
    error: str | None = None
    """Why there is nothing, or not all."""
    process: int | None = None
    deaths: int = 0
    """Of processes under it, before it came to its end."""
    died: bool = False
    """Whether that is its end."""
    unfit: bool = False
    """Whether the error is the node's."""


def run_organ_trials(job: Trials, capacity: Capacity) -> Iterator[TrialDone]:
    """Each trial once, as they end. RunError where Tune itself cannot go on, ResourceError where a node is unfit for the work."""
    deaths: Counter[str] = Counter()
    left = job
    for number in range(1, ROUNDS + 1):
        again = []
        for done in _run_round(left, capacity):
            if done.unfit:
                raise ResourceError(f"a node is unfit for the work: {done.error} The same command goes on where this one stopped.")
            deaths[done.id] += done.deaths
            if done.died and number < ROUNDS:
                again.append(done.id)
            else:
                yield replace(done, deaths=deaths[done.id])
        if not again:
            return
        left = replace(job, trials={id: job.trials[id] for id in again})


def _run_round(job: Trials, capacity: Capacity) -> Iterator[TrialDone]:
    ended: queue.Queue[TrialDone | BaseException | None] = queue.Queue()
    with TemporaryDirectory(prefix="transplant_ray-") as folder:
        stop = threading.Event()
        tuner = _tuner(job, capacity, Path(folder), ended, stop)
        fitting = threading.Thread(target=_fit, args=(tuner, ended), name="organ trials", daemon=True)  # so that Ctrl-C stays ours
        fitting.start()
        try:
            while (done := _next(ended)) is not None:
                if isinstance(done, BaseException):
                    reason = (str(done).strip().splitlines() or [repr(done)])[-1][:300]
                    raise RunError(f"the trials ended early: {reason}. The same command goes on where it stopped.") from done
                yield done
        finally:
            stop.set()
            fitting.join(STOP_SECONDS)  # what would go on after Ray has been shut down starts another


def _next(ended: queue.Queue[TrialDone | BaseException | None]) -> TrialDone | BaseException | None:
    while True:
        try:
            return ended.get(timeout=POLL_SECONDS)
        except queue.Empty:  # a thread that waits without end hears no signals
            continue


def _fit(tuner: tune.Tuner, ended: queue.Queue[TrialDone | BaseException | None]) -> None:
    try:
        tuner.fit()
        ended.put(None)
    except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
        ended.put(error)


def _tuner(
    job: Trials, capacity: Capacity, folder: Path, ended: queue.Queue[TrialDone | BaseException | None], stop: threading.Event
) -> tune.Tuner:
    return make_tuner(
        tune.with_parameters(OrganTrial, job=job),
        _resources(capacity),
        ("trial", list(job.trials)),
        _TrialListener(ended),
        folder / "trials",
        at_once=max(1, min(len(job.trials), capacity.evaluators())),
        starting=1,
        max_failures=MAX_FAILURES,
        stop=stop,
        checkpoints=tune.CheckpointConfig(checkpoint_at_end=False),  # by default a class is asked for one
    )


def _resources(capacity: Capacity) -> tune.PlacementGroupFactory:
    resources = capacity.resources
    bundle = {"CPU": resources.cpus_per_model, "GPU": resources.gpus_per_model}
    if resources.accelerator_type is not None:
        bundle[f"{ACCELERATOR}{resources.accelerator_type}"] = SHARE
    return tune.PlacementGroupFactory([{name: amount for name, amount in bundle.items() if amount}])


class OrganTrial(tune.Trainable):
    """What a process of Tune does: one trial a step, and the next by `reset_config`."""

    def setup(self, config: dict[str, Any], job: Trials | None = None) -> None:  # noqa: ARG002  # Tune keeps it as self.config
        assert job is not None, "Tune hands over what `with_parameters` was given"
        torch.set_num_threads(job.workload.num_threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.job, self.unfit = job, _unfit(job)
        device = placement(job.workload.num_gpus)
        self.resident = Resident(getattr(torch, job.workload.dtype), device)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        try:
            said, error, unfit = *answer_trial(self.job, self.config["trial"], self.resident, self.unfit), False
        except Unfit as reason:
            said, error, unfit = (), str(reason), True
        evaluator, node = who()
        for _, _, shard in said:
            count_in_evaluator(self.job.workload.run, shard)
        said = [(task, split, replace(shard, evaluator=evaluator, node=node)) for task, split, shard in said]
        return {"done": True, "said": said, "error": error, "unfit": unfit, "process": os.getpid()}


def _unfit(job: Trials) -> str | None:
    """Why nothing that this process says could go by the driver's name. Not raised where Tune would make it a death."""
    try:
        job.workload.check_node(job.workload.tokenizer)
    except TransplantError as error:
        return f"{type(error).__name__}: {error}"
    return None


class Unfit(Exception):
    """The node lacks what the driver has seen: weights, an organ."""


def answer_trial(job: Trials, id: str, resident: Resident, unfit: str | None = None) -> tuple[Said, str | None]:
    """What one model answers to all that it is asked, up to the first error of ours, and that error.

    Unfit where the node cannot do it, DeviceError where its device no longer computes.
    """
    if unfit is not None:
        raise Unfit(unfit)
    said: list[tuple[str, Split, VariantShard]] = []
    try:
        tokenizer = load_tokenizer(job.workload.tokenizer)
        model = resident.model(job.trials[id].insertion)
        for one in job.asked[id]:
            start = time.perf_counter()
            outcomes = answer_examples(id, model, tokenizer, one.examples, one.rules.generation, one.rules.scorer)
            seconds = time.perf_counter() - start
            said.append((one.task, one.split, VariantShard(id, outcomes, seconds)))
    except (TransplantError, RuntimeError) as error:  # torch reports what a device cannot do as RuntimeError
        check_devices(resident.device)
        if isinstance(error, CheckpointError):
            _look_again(job, id, resident)
        return said, f"{type(error).__name__}: {error}"
    return said, None


def _look_again(job: Trials, id: str, resident: Resident) -> None:
    """Unfit where files are not there that the driver has read: then that was the error, and not what was made of them."""
    try:
        resident.read(job.trials[id].insertion)
        read_tokenizer(job.workload.tokenizer)
    except NumericsError:
        return
    except CheckpointError as error:
        raise Unfit(f"{type(error).__name__}: {error}") from error


class _TrialListener(Listener):
    def __init__(self, ended: queue.Queue[TrialDone | BaseException | None]) -> None:
        self.ended = ended

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        found = trial.last_result or {}
        error = found.get("error") if "said" in found else "it ended without a word"
        process, unfit = found.get("process"), found.get("unfit", False)
        self.ended.put(TrialDone(trial.config["trial"], found.get("said", ()), error, process, trial.num_failures, unfit=unfit))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        reason = _reason(trial)
        died = "ResourceError: its process died again and again; memory may have run out"
        self.ended.put(TrialDone(trial.config["trial"], (), reason or died, None, trial.num_failures, died=reason is None))


def _reason(trial: Any) -> str | None:
    """What a process has raised that is no error of ours; None where it died, or its device failed."""
    error = trial.get_pickled_error()
    if error is None or isinstance(error, GONE) or isinstance(getattr(error, "cause", error), DeviceError):
        return None
    return (str(error).strip().splitlines() or [repr(error)])[-1][:300]
