"""Guards: what a transplant should not harm."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from transplant_ray.recipe.part import NAME, Part, one_of
from transplant_ray.recipe.tasks import HubData, SplitSpec, TaskSpec

MAIN = "task"
"""What is being transplanted, among tasks that have names."""
GENERAL_TEXT = "zoo:general.jsonl"
"""Passages of many sorts that come with the package."""


class GuardTask(TaskSpec):
    """A task that the transplant should not harm."""

    margin: float = Field(0.05, gt=0, lt=1)
    """Loss of accuracy that is put up with; with `scorer: loss`, nats a token."""
    split: SplitSpec = SplitSpec(probe=64, select=150, test=150)


class TextSpec(Part):
    """General text: on it a variant should go on saying what the target says. A guard that needs no labels."""

    data: str | HubData = GENERAL_TEXT
    """A JSONL or Parquet file, a hub dataset, or the passages that come with the package."""
    text: str = "{text}"
    """Template over the columns of the data."""
    tokens: int = Field(128, ge=2)
    """Of each passage, so many are read."""
    split: SplitSpec = SplitSpec(probe=24, select=24, test=60)


class GuardSpec(Part):
    """What the transplant should not harm."""

    tasks: dict[Annotated[str, Field(pattern=NAME)], GuardTask] = Field(default_factory=dict)
    held_out: str | None = None
    """The task that nothing is fitted on or chosen by; the last, where none is named."""
    text: TextSpec | None = TextSpec()
    """Where KL(target ‖ variant) is measured; null measures none."""

    @model_validator(mode="after")
    def _held_out_is_there(self) -> GuardSpec:
        if MAIN in self.tasks:
            raise ValueError(f"{MAIN!r} is what the task itself is called; give this guard another name")
        if self.held_out is not None:
            one_of(self.held_out, tuple(self.tasks), "guard")
        return self

    @property
    def spared(self) -> str | None:
        """The guard that is held out."""
        return self.held_out or next(reversed(self.tasks), None)

    @property
    def choosing(self) -> tuple[str, ...]:
        """Guards that may be fitted on and chosen by."""
        return tuple(name for name in self.tasks if name != self.spared)
