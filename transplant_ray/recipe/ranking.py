"""How modules are ranked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from transplant_ray.recipe.part import Part, distinct, one_of

ACTIVATION_RANKERS = frozenset({"lae", "lae_relative"})
"""Rankers that two actors stream statistics for."""
RESIDENT_RANKERS = frozenset({"attribution", "channel", "layers", "leave_one_out", "single", "weight_delta"})
"""Rankers that need both models in one place."""
CHANNEL_RANKERS = frozenset({"attribution", "channel"})
"""Those of them that score every output channel too."""
RANKERS = (*sorted(ACTIVATION_RANKERS | RESIDENT_RANKERS), "depth", "random")
REVERSE = "reverse:"
"""In front of a ranker: its ranking upside down."""


class RankSpec(Part):
    by: tuple[str, ...] = ("lae",)
    trajectory: Literal["own", "source", "reference"] = "own"
    """Whose text the activations are measured along."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Decode steps to measure (T); the task's limit where absent."""
    steps: int = Field(4, ge=1)
    """Points on the path that `attribution` integrates over."""

    @field_validator("by")
    @classmethod
    def _known_rankers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one ranker is needed")
        for ranker in value:
            one_of(ranker.removeprefix(REVERSE), RANKERS, "ranker")
        return distinct(value)

    @property
    def measured(self) -> frozenset[str]:
        """The rankers that have to be measured: one that is reversed is measured upright."""
        return frozenset(ranker.removeprefix(REVERSE) for ranker in self.by)

    @model_validator(mode="after")
    def _settings_have_effect(self) -> RankSpec:
        defaults = {"trajectory": "own", "max_new_tokens": None}
        idle = [name for name, default in defaults.items() if getattr(self, name) != default]
        if idle and not ACTIVATION_RANKERS & self.measured:
            raise ValueError(f"{idle} has no effect: none of {list(self.by)} measures activations")
        if self.steps != 4 and "attribution" not in self.measured:
            raise ValueError(f"`steps` has no effect: {list(self.by)} does not have `attribution`")
        return self
