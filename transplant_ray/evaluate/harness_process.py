"""The process in which a task of lm-evaluation-harness judges answers: its filters and its `process_results`.

It knows the task by its YAML file, and of its data only the row that is judged, which comes with the question: no dataset is needed
where models run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transplant_ray.evaluate.guarded import serve

HARNESS = "lm_eval:"
"""Begins the name of a scorer that is a task of the harness."""

NOTHING_FOUND = "[invalid]"
"""What filters of the library put where they find nothing."""

Heard = str | tuple[float, bool]
"""What a model gave to a request: a completion, or a log-likelihood and whether greedy decoding says it."""

Judged = tuple[bool, str | None, str | None]
"""Right, what was read out of the completion, why it could not be judged."""


@dataclass(frozen=True)
class JudgeSpec:
    """A task and what of it counts. As a string it is a scorer, and travels as other scorers do."""

    path: str
    """The task's YAML file; relative to the tasks of the library where it comes from there."""
    metric: str
    filter: str
    features: tuple[str, ...]
    """Columns of the data."""
    multiple_input: int
    multiple_target: int

    @property
    def scorer(self) -> str:
        return HARNESS + json.dumps(asdict(self), sort_keys=True)

    @property
    def is_somebodys(self) -> bool:
        """Whether its file is not the library's."""
        return Path(self.path).is_absolute()

    @classmethod
    def of(cls, scorer: str) -> JudgeSpec:
        settings = json.loads(scorer.removeprefix(HARNESS))
        return cls(**{**settings, "features": tuple(settings["features"])})


def library_tasks() -> Path:
    """The folder of the tasks that the library brings."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def sandbox_templates() -> None:
    """Templates of tasks see their row and nothing of Python: a YAML file from anywhere may hold one."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    plain = lm_eval.utils.env
    if not isinstance(plain, SandboxedEnvironment):
        settings = {name: getattr(plain, name) for name in ("loader", "undefined", "keep_trailing_newline")}
        lm_eval.utils.env = SandboxedEnvironment(**settings)
        lm_eval.utils.env.filters.update(plain.filters)


class _Rows(list[dict[str, Any]]):
    """All the data that a task has here."""

    features: Mapping[str, None] = {}


_rows = _Rows()


def given_rows(**_settings: object) -> dict[str, list[dict[str, Any]]]:
    """The dataset of a task: the row in question."""
    return {"test": _rows}


_CHANGES: dict[str, Any] = {
    "process_docs": None,  # rows arrive processed
    "training_split": None,
    "validation_split": None,
    "fewshot_split": None,
    "test_split": "test",
    "fewshot_config": {"samples": []},
    "num_fewshot": 0,
    "dataset_kwargs": None,
}


@cache
def _task(scorer: str) -> Any:
    from lm_eval.tasks import TaskManager

    spec = JudgeSpec.of(scorer)
    _rows.features = dict.fromkeys(spec.features)
    changes = [f"{key}: {json.dumps(value)}" for key, value in _CHANGES.items()]
    include = f"include: {json.dumps(str(library_tasks() / spec.path))}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.yaml"
        file.write_text(
            "\n".join([include, "custom_dataset: !function transplant_ray.evaluate.harness_process.given_rows", *changes])
        )
        (task,) = TaskManager(include_defaults=False).load(str(file))["tasks"].values()
    task.features, task.multiple_input, task.multiple_target = list(spec.features), spec.multiple_input, spec.multiple_target
    return task


def _judge(question: tuple[str, dict[str, Any], Sequence[Heard] | None]) -> Judged:
    """Of a question without answers, only the task is read."""
    scorer, doc, heard = question
    _rows[:] = [doc]
    spec, task = JudgeSpec.of(scorer), _task(scorer)
    if heard is None:
        return True, None, None
    task.build_all_requests()
    requests = sorted(task.instances, key=lambda request: request.idx)
    for request, said in zip(requests, heard, strict=True):
        request.resps = [said] * (request.repeats or 1)
    task.apply_filters()
    filtered = [request.filtered_resps[spec.filter] for request in requests]
    value = task.process_results(doc, filtered)[spec.metric]
    shown = None if filtered[0] == NOTHING_FOUND else str(filtered[0])
    if not _is_truth(value):
        return False, shown, f"{spec.metric} is {value!r}, and neither 0 nor 1"
    return bool(value), shown, None


def _is_truth(value: object) -> bool:
    try:
        return float(value) in (0.0, 1.0)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def begin() -> Callable[[tuple[str, dict[str, Any], Sequence[Heard] | None]], Judged]:
    """ImportError where the library is missing."""
    import lm_eval.tasks  # noqa: F401

    sandbox_templates()

    def guarded(question: tuple[str, dict[str, Any], Sequence[Heard] | None]) -> Judged:
        try:
            return _judge(question)
        except Exception as error:  # noqa: BLE001  # what a task's own functions raise is anything, and is told as their failure
            return False, None, f"{type(error).__name__}: {error}"

    return guarded


if __name__ == "__main__":
    from transplant_ray.evaluate import harness_process  # tasks find `given_rows` there, and not in `__main__`

    serve(harness_process.begin)
