"""Where trials wait for their results. Imported by every trial process: it must not import torch."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from itertools import count
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from transplant_ray.errors import TransplantError

Row = dict[str, Any]


@ray.remote(num_cpus=0)
class Mailbox:
    """Rows of results by the label of their trial: one per rung, and the last one says so."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.arrived = asyncio.Condition()
        self.failure: str | None = None

    async def post(self, label: str, row: Row) -> None:
        async with self.arrived:
            self.rows[label].append(row)
            self.arrived.notify_all()

    async def wait(self, label: str, number: int) -> Row:
        """Row `number` of a trial, from 0."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: self.failure is not None or len(self.rows[label]) > number)
        if self.failure is not None:
            raise TransplantError(f"evaluation ended early: {self.failure}")
        return self.rows[label][number]

    async def fail(self, reason: str) -> None:
        """Nothing more will come: wake all who wait."""
        async with self.arrived:
            self.failure = reason
            self.arrived.notify_all()


def run_trial(config: dict[str, Any], mailbox: ActorHandle) -> None:
    """One point of the grid: holds no model, waits for its outcomes, reports its metrics at every rung."""
    for number in count():
        row = ray.get(mailbox.wait.remote(config["point"]["label"], number))
        tune.report(row)
        if row["last"]:
            return
