"""What the workers of a training have to say, for the driver to read. A process of its own: it must not import torch."""

from __future__ import annotations

from typing import Any

import ray

from transplant_ray.errors import TransplantError

Said = dict[str, Any]


@ray.remote(num_cpus=0)
class Bulletin:
    def __init__(self) -> None:
        self.points: list[Said] = []
        self.starts = 0
        self.failure: TransplantError | None = None

    def begin(self) -> None:
        self.starts += 1

    def post(self, point: Said) -> None:
        self.points.append(point)

    def fail(self, error: TransplantError) -> None:
        """The first counts: others may only come of it."""
        self.failure = self.failure or error

    def failed(self) -> bool:
        return self.failure is not None

    def read(self, after: int) -> tuple[list[Said], int, TransplantError | None]:
        """Points from number `after` on, how often the training was begun, and what ended it where it could not go on."""
        return self.points[after:], self.starts, self.failure
