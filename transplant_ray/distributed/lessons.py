"""The trainings of a comparison as Ray Tune runs them: a trial is a lesson, with the GPU or the CPUs of one.

A trial whose process dies is begun again and goes on from its lesson's own checkpoints: Tune keeps none.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import transformers
from ray import tune

from transplant_ray.distributed.room import room
from transplant_ray.distributed.tuning import Listener, make_tuner
from transplant_ray.errors import RunError, TransplantError
from transplant_ray.organ.lessons import Learnt, Lesson, carry_out, failed, read_learnt
from transplant_ray.organ.training import Point
from transplant_ray.recipe import ResourceSpec, RoomSpec

POLL_SECONDS = 0.2
OnPoint = Callable[[Lesson, Point], None]
OnLearnt = Callable[[Learnt], None]


def resources_of(asked: RoomSpec) -> ResourceSpec:
    """As `connect` and `wait_for_room` take them."""
    return ResourceSpec(address=asked.address, gpus_per_model=asked.gpus, cpus_per_model=asked.cpus, wait=asked.wait)


def run_lessons(
    lessons: Sequence[Lesson], asked: RoomSpec, folder: Path, on_point: OnPoint, on_learnt: OnLearnt
) -> dict[str, Learnt]:
    """Carry all of them out, as many side by side as there is room for; what came of each, by key.

    Both callbacks are called in this thread. A lesson that cannot be carried out is learnt as failed; RunError where Tune itself is
    at its end. `folder` takes Tune's own state and is removed.
    """
    learnt: dict[str, Learnt] = {}
    why: dict[str, str] = {}
    for _ in range(1 + (asked.max_failures > 0)):
        left = {lesson.key: lesson for lesson in lessons if lesson.key not in learnt}
        if left:  # Tune gives some up at once, whatever `max_failures` says (docs/decisions/0025)
            why = _round(left, learnt, asked, folder, on_point, on_learnt)
    for lesson in lessons:
        if lesson.key not in learnt:
            learnt[lesson.key] = failed(lesson, why[lesson.key])
            on_learnt(learnt[lesson.key])
    return learnt


def _round(
    lessons: Mapping[str, Lesson], learnt: dict[str, Learnt], asked: RoomSpec, folder: Path, on_point: OnPoint, on_learnt: OnLearnt
) -> dict[str, str]:
    """One run of Tune over `lessons`; adds to `learnt` what came of them, and returns why of some nothing did."""
    told: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    ended: list[Any] = []
    thread = threading.Thread(target=_fit, args=(_tuner(lessons, asked, folder, told), ended), name="lessons", daemon=True)
    thread.start()  # so that Ctrl-C stays ours
    while thread.is_alive() or not told.empty():
        try:
            said = told.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if said.get("learnt") is not None:
            learnt[said["key"]] = Learnt.from_json(json.loads(said["learnt"]))
            on_learnt(learnt[said["key"]])
        elif said.get("point") is not None:
            on_point(lessons[said["key"]], Point(**json.loads(said["point"])))
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(ended[0], BaseException):
        raise RunError(f"Ray Tune ended early ({_last_line(ended[0])}). The same command goes on where it stopped.") from ended[0]
    for key in lessons.keys() - learnt.keys():
        if (found := read_learnt(lessons[key])) is not None:  # its process died after the last word was written
            learnt[key] = found
            on_learnt(found)
    return {key: _why(ended[0], key, asked) for key in lessons.keys() - learnt.keys()}


def _tuner(lessons: Mapping[str, Lesson], asked: RoomSpec, folder: Path, told: queue.SimpleQueue[Any]) -> tune.Tuner:
    at_once = max(1, room(ray.nodes(), resources_of(asked), "evaluator"))
    bundle = {"CPU": asked.cpus, **({"GPU": asked.gpus} if asked.gpus else {})}
    return make_tuner(
        tune.with_parameters(_trial, lessons=dict(lessons), num_threads=asked.cpus),
        tune.PlacementGroupFactory([bundle]),
        ("key", list(lessons)),
        _PointListener(told),
        folder,
        at_once=at_once,
        starting=at_once,
        max_failures=asked.max_failures,
    )


def _trial(config: dict[str, Any], lessons: Mapping[str, Lesson], num_threads: int) -> None:
    """An error of ours would come again however often it is tried: it is told, and the trial is done."""
    lesson = lessons[config["key"]]
    torch.set_num_threads(num_threads)
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda:0" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
    try:
        learnt = carry_out(lesson, device, lambda point: tune.report(_said(lesson, point=point)))
    except TransplantError as error:
        learnt = failed(lesson, str(error))
    tune.report(_said(lesson, learnt=learnt))


def _said(lesson: Lesson, **told: Point | Learnt) -> dict[str, Any]:
    """As text, for Tune takes nested values apart."""
    return {"key": lesson.key, **{name: json.dumps(value.to_json()) for name, value in told.items()}}


class _PointListener(Listener):
    """Runs in the thread of Tune, on the driver."""

    def __init__(self, told: queue.SimpleQueue[Any]) -> None:
        self.told = told

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:  # noqa: ARG002
        self.told.put({name: result.get(name) for name in ("key", "point", "learnt")})


def _fit(tuner: tune.Tuner, ended: list[Any]) -> None:
    try:
        ended.append(tuner.fit())
    except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
        ended.append(error)


def _why(results: Any, key: str, asked: RoomSpec) -> str:
    errors = [result.error for result in results if result.config["key"] == key and result.error is not None]
    reason = _last_line(errors[0]) if errors else "nothing was reported"
    return f"its process died more than {asked.max_failures} times ({reason}); the same command tries again"


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1][:300]
