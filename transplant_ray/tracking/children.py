"""Nested runs of a run, each made once although requests and answers get lost."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Run


class Children:
    """Of one parent; `tag` marks those that are ours. Asked by the thread of the outbox alone."""

    def __init__(self, client: MlflowClient, experiment_id: str, parent: str, tag: str) -> None:
        self._client, self._experiment_id, self._parent, self._tag = client, experiment_id, parent, tag
        self._known: set[str] = set()
        self._tried_again = False

    def make(self, name: str, mark: str, at: int, again: bool) -> str:
        """A new run, whose tag says `mark`; or the one that an earlier try has made without hearing of it. Returns its id."""
        self._tried_again |= again
        made = [run for run in self._found() if self._is(run, name, mark)] if again else []
        run = made[0] if made else self._client.create_run(
            self._experiment_id, at, {"mlflow.parentRunId": self._parent, self._tag: mark}, name
        )  # fmt: skip
        run_id: str = run.info.run_id
        self._known.add(run_id)
        return run_id

    def remove_doubles(self) -> None:
        """A server that was only slow has made a run that nobody waited for any more, beside the one of the second try."""
        for run in list(self._found()) if self._tried_again else ():
            if self._tag in run.data.tags and run.info.run_id not in self._known:
                self._client.delete_run(run.info.run_id)

    def _is(self, run: Run, name: str, mark: str) -> bool:
        return (run.info.run_name, run.data.tags.get(self._tag)) == (name, mark)

    def _found(self) -> Iterator[Run]:
        token = None
        while token != "":
            query = f"tags.`mlflow.parentRunId` = '{self._parent}'"
            page = self._client.search_runs([self._experiment_id], query, page_token=token)
            yield from page
            token = page.token or ""
