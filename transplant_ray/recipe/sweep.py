"""The grid of trials, its controls, and how a winner is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from transplant_ray.recipe.part import Kind, Part, distinct, grid_axis, one_of

MERGES = ("task_arithmetic", "ties", "dare_ties", "dare_linear")
SPARSE_MERGES = frozenset({"ties", "dare_ties", "dare_linear"})
"""Merges that keep a share of every task vector; mergekit makes them."""
FEWEST_ARMS = 19
"""With fewer, (1 + 0) / (arms + 1) is over 0.05."""


class ControlSpec(Part):
    """Variants that should not win; they are in every sweep."""

    random: int = Field(3, ge=3)
    """Seeds of random sets, for every kind and K."""
    alpha: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5, 0.75)
    """Uniform coefficients over all modules, a linear merge."""
    merges: tuple[str, ...] = ()
    """Merges of target and source around `base`: `task_arithmetic`, and by mergekit `ties`, `dare_ties`, `dare_linear`."""
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0)
    """λ of every merge: base + λ · (what it makes of the two task vectors)."""
    density: float = Field(0.5, gt=0, le=1)
    """Share of each task vector that TIES and DARE keep."""

    @field_validator("alpha", "scales")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return grid_axis(value)

    @field_validator("merges")
    @classmethod
    def _known_merges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return distinct([one_of(merge, MERGES, "merge") for merge in value])

    @model_validator(mode="after")
    def _merge_settings_have_effect(self) -> ControlSpec:
        if self.scales != (0.5, 1.0) and not self.merges:
            raise ValueError("`scales` has no effect without `merges`")
        if self.density != 0.5 and not SPARSE_MERGES & set(self.merges):
            raise ValueError(f"`density` has no effect: {list(self.merges)} has none of {sorted(SPARSE_MERGES)}")
        return self


class ScreenSpec(Part):
    """Generate only for the trials that read the reference answers best; a loss costs one forward pass."""

    keep: float = Field(gt=0, lt=1)
    """Share of the trials that goes on, rounded up."""
    by: Literal["loss"] = "loss"


class RaceSpec(Part):
    """Synchronous halving on the select split: at every rung only the best trials go on."""

    rungs: tuple[Annotated[int, Field(ge=1)], ...]
    """Numbers of select examples, ascending."""
    keep: float = Field(0.5, gt=0, lt=1)
    """Share of the trials that goes on at each rung, rounded up."""

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError("expected numbers of examples in ascending order, each once")
        return value


class PrimarySpec(Part):
    """One trial of the grid that is named before anything is measured: it is the winner whatever the others reach."""

    by: str
    kind: Kind = "all"
    k: int = Field(ge=1)


class ObjectiveSpec(Part):
    """What the winner is chosen by, beside its accuracy on select; the guard that is held out has no say."""

    price: float = Field(0.0, ge=0)
    """Points of accuracy that are given up for a point that the guards lose, on average; nats where a task's scorer is `loss`."""
    veto: bool = False
    """Whether a trial that loses more than the margin on a guard is out."""

    @model_validator(mode="after")
    def _has_effect(self) -> ObjectiveSpec:
        if self.price == 0 and not self.veto:
            raise ValueError("an objective without a `price` or a `veto` has no effect")
        return self


class SweepSpec(Part):
    """The grid: ranker × kind × K × alpha, and the same again for every share of channels."""

    k: tuple[Annotated[int, Field(ge=1)], ...]
    kind: tuple[Kind, ...] = ("all",)
    extrapolate: bool = False
    """Allow coefficients outside [0, 1]."""
    alpha: tuple[float, ...] = Field((1.0,), validate_default=True)
    """Coefficient of the chosen modules, in (0, 1]; 1 is the hard transplant."""
    channels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the output channels of the chosen modules, those that score highest; whole modules are always tried too."""
    objective: ObjectiveSpec | None = None
    loss: bool = True
    """Whether every variant reads the reference answers too, for its mean token loss: a pass over each, and nothing decoded."""
    screen: ScreenSpec | None = None
    race: RaceSpec | None = None
    primary: PrimarySpec | None = None
    arms: int | None = None
    """Arms that tell the winner from chance, 19 or more: each is as many random sets as there are trials, chosen from by the same
    rule. 0 tests nothing. By default 0, and 19 with a primary trial, for which an arm is one random set."""
    controls: ControlSpec = ControlSpec()

    @property
    def num_arms(self) -> int:
        if self.arms is None:
            return 0 if self.primary is None else FEWEST_ARMS
        return self.arms

    @field_validator("arms")
    @classmethod
    def _enough(cls, value: int | None) -> int | None:
        if value is not None and value != 0 and value < FEWEST_ARMS:
            raise ValueError(f"with fewer than {FEWEST_ARMS} arms no winner can have a p of 0.05; use {FEWEST_ARMS} or more, or 0")
        return value

    @model_validator(mode="after")
    def _primary_is_a_trial(self) -> SweepSpec:
        if self.primary is None:
            return self
        for name, grid in (("kind", self.kind), ("k", self.k)):
            if getattr(self.primary, name) not in grid:
                raise ValueError(f"`primary.{name}` is {getattr(self.primary, name)!r}, which is not in the grid {list(grid)}")
        if len(self.alpha) > 1:
            raise ValueError("`primary` names one trial, and there are several `alpha`; give one")
        if self.objective is not None:
            raise ValueError("`objective` has no effect with `primary`, which names the winner beforehand; drop one of them")
        if self.screen is not None or self.race is not None:
            raise ValueError("`screen` and `race` choose among trials, and `primary` names the winner beforehand; drop one of them")
        return self

    @field_validator("channels")
    @classmethod
    def _each_once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return distinct(value)

    @field_validator("k", "kind", "alpha")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return grid_axis(value)

    @field_validator("alpha")
    @classmethod
    def _in_range(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        outside = [alpha for alpha in value if not 0 < alpha <= 1]
        if 0 in value:
            raise ValueError("0 is the target itself, which is in every sweep")
        if outside and not info.data.get("extrapolate"):
            raise ValueError(f"{outside[0]:g} is outside (0, 1]; add `sweep.extrapolate: true` if that is meant")
        return value
