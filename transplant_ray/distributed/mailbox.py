"""Where trials wait for their results. Imported by every trial process: it must not import torch."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from transplant_ray.errors import TransplantError

Row = dict[str, Any]


@ray.remote(num_cpus=0)
class Mailbox:
    """Rows of results by the label of their trial."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.arrived: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.failure: str | None = None

    async def post(self, label: str, row: Row) -> None:
        self.rows[label] = row
        self.arrived[label].set()

    async def wait(self, label: str) -> Row:
        event = self.arrived[label]
        if self.failure is None:
            await event.wait()
        if self.failure is not None:
            raise TransplantError(f"evaluation ended early: {self.failure}")
        return self.rows[label]

    async def fail(self, reason: str) -> None:
        """Nothing more will come: wake all who wait."""
        self.failure = reason
        for event in self.arrived.values():
            event.set()


def run_trial(config: dict[str, Any], mailbox: ActorHandle) -> None:
    """One point of the grid: holds no model, waits for its outcomes, reports its metrics."""
    tune.report({"result": ray.get(mailbox.wait.remote(config["point"]["label"]))})
