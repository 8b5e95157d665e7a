"""Variants that are searched for instead of ranked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from transplant_ray.recipe.part import Kind, Part, distinct, grid_axis, one_of


class _Penalised(Part):
    """A search that weighs what is gained on the task against what is lost on guards."""

    penalty: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.3, 1.0, 3.0)
    """λ, one result each: how many nats of task loss a nat of guard loss is worth. Only 0 has an effect where nothing guards."""
    kind: Kind = "all"
    """Modules that may change."""

    @field_validator("penalty")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return grid_axis(value)


class GatesSpec(_Penalised):
    """Coefficients that are fitted by projected gradient on the probe set, then rounded to 0 or 1."""

    unit: Literal["row", "module"] = "row"
    """A gate for every output channel, or for every module."""
    steps: int = Field(60, ge=1)
    """Of Adam, each over all probe examples of task and guards."""
    learning_rate: float = Field(0.1, gt=0, le=1)


class GreedySpec(_Penalised):
    """Modules that are added one by one, each time the one that lowers loss plus penalty most, while one does."""

    k: int | None = Field(None, ge=1)
    """At most so many modules."""


SearchSettings = GatesSpec | GreedySpec
SEARCHES = ("gates", "greedy")


class SearchSpec(Part):
    """Variants that are searched for instead of ranked: a name, a list of names, or a mapping name → settings."""

    gates: GatesSpec | None = None
    greedy: GreedySpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                one_of(str(name), SEARCHES, "search")
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a name, a list of names, or a mapping name → settings; names are {list(SEARCHES)}")
        return {one_of(name, SEARCHES, "search"): {} for name in distinct(names)}

    @model_validator(mode="after")
    def _some(self) -> SearchSpec:
        if self.gates is None and self.greedy is None:
            raise ValueError(f"names no search; expected some of {list(SEARCHES)}, or no `search` at all")
        return self

    @property
    def wanted(self) -> dict[str, SearchSettings]:
        """Name → settings."""
        both = {"gates": self.gates, "greedy": self.greedy}
        return {name: spec for name, spec in both.items() if spec is not None}
