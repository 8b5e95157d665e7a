"""A comparison: the same data, tokens and tuning for organs, LoRA and full fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from transplant_ray.recipe.corpus import MeasuredSpec
from transplant_ray.recipe.part import NAME, Part, grid_axis
from transplant_ray.recipe.training import BudgetSpec, TrainingSpec
from transplant_ray.recipe.whole import ModelSpec, TrackingSpec, content_hash, recorded

ONE_MODEL = "model"
"""What the model is called where there is only one."""


class ComparedSpec(BudgetSpec):
    """The budget that every method has; `domain` is what they are chosen and judged by, so nothing is held out by default."""

    held_out: float = Field(0.0, ge=0, lt=1)

    def training(self, lr: float, seed: int) -> TrainingSpec:
        return TrainingSpec.model_validate({**self.model_dump(), "lr": lr, "seed": seed})


class OrganMethod(Part):
    """Layers alone, in the frozen embedding and head; put in where the domain text of `select` likes them best."""

    layers: str = "default"
    """As `organ extract` takes them."""


class LoraMethod(Part):
    """Low-rank matrices beside every linear map of the layers, by peft (the extra `lora`)."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    """What the matrices' product is multiplied by, times the rank; twice the rank by default."""

    @property
    def scale(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


class FullMethod(Part):
    """Every parameter."""


class InPlaceMethod(Part):
    """The organ's layers, trained inside of the whole model: tells few layers from the wrapper."""

    layers: str | None = None
    """Those of `organ` by default."""


class MethodsSpec(Part):
    organ: OrganMethod | None = None
    lora: LoraMethod | None = None
    full: FullMethod | None = None
    in_place: InPlaceMethod | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_is_wanted(cls, value: Any) -> Any:
        """`full:` without settings is `full: {}`; a list of names will do too."""
        if isinstance(value, list):
            value = dict.fromkeys(grid_axis(tuple(value)))
        return (
            {name: {} if settings is None else settings for name, settings in value.items()} if isinstance(value, dict) else value
        )

    @model_validator(mode="after")
    def _at_least_one(self) -> MethodsSpec:
        if not self.wanted:
            raise ValueError(f"no method; expected some of {', '.join(type(self).model_fields)}")
        return self

    @property
    def wanted(self) -> dict[str, Part]:
        """By name, in one order whatever the recipe's."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: method for name, method in found.items() if method is not None}

    @property
    def layers(self) -> str:
        """The organ's, and by default those of `in_place`."""
        return self.organ.layers if self.organ is not None else "default"


class TuneSpec(Part):
    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """The same for every method, and so as many trainings."""
    seed: int = Field(1000, ge=0)
    """Of the trainings that tune; none of `seeds`."""

    @field_validator("lr")
    @classmethod
    def _rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in value):
            raise ValueError("expected learning rates above 0")
        return tuple(sorted(grid_axis(value)))


class RoomSpec(Part):
    """What a training gets, and how many go side by side."""

    address: str | None = None
    """Address of a Ray cluster; without one Ray starts in this process (or `RAY_ADDRESS` is joined)."""
    gpus: int = Field(0, ge=0, le=1)
    cpus: int = Field(1, ge=1)
    """Its threads."""
    at_once: int | None = Field(None, ge=1)
    """Trainings that go side by side at most; by default as many as the cluster has room for."""
    max_failures: int = Field(3, ge=0)
    """Deaths of its process after which a training is given up; until then it goes on from its last checkpoint."""
    wait: float = Field(0, ge=0)
    """Seconds to wait for nodes where the cluster has no room yet."""


class OrganTracking(TrackingSpec):
    experiment: str = "organs"


class CompareRecipe(Part):
    """Everything a user decides about a comparison; `load_compare_recipe` reads one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    model: ModelSpec | None = None
    """The recipient of everything that is learnt."""
    models: dict[str, ModelSpec] = Field(default_factory=dict)
    """Instead of `model`: several by name, each with a comparison of its own."""
    training: ComparedSpec
    methods: MethodsSpec
    tune: TuneSpec = TuneSpec()
    seeds: tuple[int, ...] = (0, 1, 2)
    domain: MeasuredSpec
    """Text of the kind that is trained on, and none of it: learning rates and positions are chosen on its half `select`, and what
    is said is measured on `test`."""
    general: MeasuredSpec
    """Other text: the price."""
    resources: RoomSpec = RoomSpec()
    tracking: OrganTracking = OrganTracking()
    storage: str = "runs"
    """Results go to `<storage>/<name>/`, a folder that all nodes see."""
    keep: bool = True
    """Whether what the seeds ship stays in the run folder; what was only tuned never does."""

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in value):
            raise ValueError("expected seeds of 0 and more")
        return grid_axis(value)

    @field_validator("storage")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("expected a folder that all nodes see; trainings write their checkpoints there")
        return value

    @model_validator(mode="after")
    def _models(self) -> CompareRecipe:
        if (self.model is None) == (not self.models):
            raise ValueError("expected either `model` or `models` with a name for each")
        if wrong := [name for name in self.models if not re.match(NAME, name)]:
            raise ValueError(f"`models`: {wrong[0]!r} is no name; expected letters, digits, `.`, `_` and `-`")
        return self

    @model_validator(mode="after")
    def _seeds_apart(self) -> CompareRecipe:
        if self.tune.seed in self.seeds:
            raise ValueError(f"`tune.seed` {self.tune.seed} is one of `seeds`; what is chosen by a seed says nothing on it")
        return self

    @model_validator(mode="after")
    def _measured_apart(self) -> CompareRecipe:
        trained = self.training
        for name, measured in (("domain", self.domain), ("general", self.general)):
            both = [str(each) for each in measured.data if each in trained.data]
            apart = measured.share[1] <= trained.share[0] or trained.share[1] <= measured.share[0]
            if both and not apart:
                raise ValueError(
                    f"`{name}` is measured on {both[0]}, of which `training` reads share {list(trained.share)} and `{name}` "
                    f"{list(measured.share)}; give them shares with nothing in common, such as [0.2, 1] and [0, 0.2]"
                )
        return self

    @property
    def named_models(self) -> dict[str, ModelSpec]:
        return self.models if self.model is None else {ONE_MODEL: self.model}

    def trainings(self) -> Iterator[tuple[str, str, str, float | None, int]]:
        """Model, method, stage (`tune`, `confirm`), learning rate (None: the one that tuning finds) and seed of each."""
        for model in self.named_models:
            for method in self.methods.wanted:
                yield from ((model, method, "tune", lr, self.tune.seed) for lr in self.tune.lr)
                yield from ((model, method, "confirm", None, seed) for seed in self.seeds)

    def identity(self) -> str:
        """Content hash of all that can change a result."""
        return content_hash(self.model_dump(mode="json", exclude={"tracking", "storage", "resources", "keep"}))

    def to_yaml(self) -> str:
        """For the record: addresses come without what is secret in them."""
        text: str = yaml.safe_dump(recorded(self, exclude_none=True), sort_keys=False)
        return text
