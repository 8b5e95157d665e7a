"""An MLflow server that loses requests and answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Bag
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS


class Page(list[Any]):
    token = ""


@dataclass
class Server:
    """As much of an MlflowClient as trackers use. `troubles`: method → what becomes of its next calls."""

    troubles: dict[str, list[str]] = field(default_factory=dict)
    runs: dict[str, Bag] = field(default_factory=dict)
    versions: list[Bag] = field(default_factory=list)
    numbers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    ended: dict[str, tuple[str, int]] = field(default_factory=dict)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    hang: threading.Event | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(type(self), f"do_{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.hang is not None:
                self.hang.wait(60)
            trouble = (self.troubles.get(name) or [""]).pop(0)
            if trouble == "refused":
                raise MlflowException("a value is too long", INVALID_PARAMETER_VALUE)
            if trouble == "away":
                raise MlflowException("API request to http://me:open-sesame@host/api failed with exception: refused")
            answer = method(self, *args, **kwargs)
            if trouble == "lost":
                raise MlflowException("API request failed with exception: connection reset by peer")
            return answer

        return call

    def do_get_experiment_by_name(self, name: str) -> Bag:
        return Bag(experiment_id=name)

    def do_create_run(
        self,
        experiment: str,
        start_time: int | None = None,
        tags: Mapping[str, str] | None = None,
        run_name: str | None = None,
    ) -> Bag:
        id = f"run-{len(self.runs)}"
        self.runs[id] = Bag(
            info=Bag(run_id=id, run_name=run_name, start_time=start_time, artifact_uri=f"store:/{id}"),
            data=Bag(tags=tags or {}),
            experiment=experiment,
        )
        return self.runs[id]

    def do_get_run(self, id: str) -> Bag:
        return self.runs[id]

    def do_search_runs(self, _experiments: list[str], query: str, page_token: str | None = None) -> Page:
        assert page_token is None
        return Page(run for run in self.runs.values() if run.data.tags.get("mlflow.parentRunId", "?") in query)

    def do_delete_run(self, id: str) -> None:
        del self.runs[id]

    def do_log_batch(self, id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: bool = False) -> None:
        assert synchronous or not metrics
        self.numbers.append((id, {"metrics": metrics, "params": params, "tags": tags}))

    def do_log_text(self, id: str, text: str, name: str) -> None:
        self.files[id, name] = text.encode()

    def do_log_dict(self, id: str, content: dict[str, Any], name: str) -> None:
        self.files[id, name] = str(content).encode()

    def do_log_artifact(self, id: str, path: str, under: str | None) -> None:
        self.files[id, f"{under or '.'}/{Path(path).name}"] = Path(path).read_bytes()

    def do_set_tag(self, id: str, key: str, value: str, synchronous: bool) -> None:
        assert synchronous
        self.tags[id, key] = value

    def do_set_terminated(self, id: str, status: str, end_time: int) -> None:
        self.ended[id] = (status, end_time)

    def do_create_registered_model(self, name: str) -> None:
        if any(version.name == name for version in self.versions):
            raise MlflowException("there", RESOURCE_ALREADY_EXISTS)

    def do_create_model_version(self, name: str, source: str, run_id: str) -> Bag:
        self.versions.append(Bag(name=name, source=source, run_id=run_id, version=len(self.versions) + 1))
        return self.versions[-1]

    def do_search_model_versions(self, query: str) -> list[Bag]:
        return [version for version in self.versions if f"'{version.run_id}'" in query]

    def do_set_registered_model_alias(self, *_: Any) -> None: ...
