"""The recipe of an organ sweep: which organs go where in a recipient, and on what text that is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from transplant_ray.recipe.corpus import MeasuredSpec
from transplant_ray.recipe.guards import GuardTask
from transplant_ray.recipe.part import NAME, Part, distinct, grid_axis
from transplant_ray.recipe.whole import Acceptance, ModelSpec, ResourceSpec, TrackingSpec, content_hash, record_yaml

DOMAIN, GENERAL = "domain", "general"
"""The two texts, among tasks that have names: what an organ is for, and what it should not cost."""
IDLE = ("labels", "shard_size")
"""Of `resources`, what says nothing here: a trial is placed by Ray Tune, and is one unit of work."""


class PlacesSpec(Part):
    """The grid: every organ at every position in every mode."""

    positions: Literal["all"] | tuple[int, ...] = "all"
    """Layers of the recipient, counted from 0, that an organ is put before or replaces from on; `all`: wherever it fits."""
    modes: tuple[Literal["insert", "replace"], ...] = ("insert", "replace")
    most_lost: float | None = Field(None, ge=0)
    """Nats a token that a winner may lose on general text against the recipient, on select; null: whatever it costs."""
    level: float = Field(0.05, gt=0, lt=0.5)
    """Of the tests that confirm; intervals are at 1 − level."""

    @field_validator("positions")
    @classmethod
    def _positions(cls, value: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        if value == "all":
            return "all"
        if any(at < 0 for at in value):
            raise ValueError("layers are counted from 0")
        return grid_axis(value)

    @field_validator("modes")
    @classmethod
    def _modes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return grid_axis(value)


class OrganControlSpec(Part):
    """What stands beside the trials and can never win."""

    untrained: bool = True
    """The same layers as they were before training, at the same places: layers that are there twice may do something too."""
    alone: bool = True
    """The organ between the recipient's embedding and head, with no layer of the recipient: what it was trained in."""


class OrganRecipe(Part):
    """Everything a user decides about a sweep over places of organs; `load_organ_recipe` reads one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    recipient: ModelSpec
    organs: dict[Annotated[str, Field(pattern=NAME)], str] = Field(min_length=1)
    """Names of your choice, and the folders of the organs."""
    sweep: PlacesSpec = PlacesSpec()
    controls: OrganControlSpec = OrganControlSpec()
    domain: MeasuredSpec
    """Text of what the organs were trained for, that none of them was trained on."""
    general: MeasuredSpec
    """Any other text: the price."""
    context: int = Field(512, ge=2)
    """Tokens that are read at a time."""
    tasks: dict[Annotated[str, Field(pattern=NAME)], GuardTask] = Field(default_factory=dict)
    """Asked beside: nothing is chosen by them."""
    vocabulary: Literal["refuse", "warn"] = "refuse"
    """What becomes of an organ that has seen another vocabulary."""
    resources: ResourceSpec = ResourceSpec()
    tracking: TrackingSpec = TrackingSpec(experiment="organs")
    storage: str = "runs"
    """Results go to `<storage>/<name>/`: a folder, or an object store such as `s3://bucket/runs`."""
    ledger: bool = True
    """Whether outcomes that are known under this storage are taken from its ledger, and new ones kept in it."""
    accept: tuple[Acceptance, ...] = ()
    """As in the recipe of a transplant: of the recipient, and of tasks."""

    @field_validator("tasks")
    @classmethod
    def _texts_keep_their_names(cls, value: dict[str, GuardTask]) -> dict[str, GuardTask]:
        if taken := sorted({DOMAIN, GENERAL} & value.keys()):
            raise ValueError(f"{taken[0]!r} is what one of the texts is called; give this task another name")
        return value

    @field_validator("organs")
    @classmethod
    def _folders_differ(cls, value: dict[str, str]) -> dict[str, str]:
        distinct(tuple(value.values()))
        return value

    @field_validator("resources")
    @classmethod
    def _resources_have_effect(cls, value: ResourceSpec) -> ResourceSpec:
        plain = ResourceSpec()
        if idle := [name for name in IDLE if getattr(value, name) != getattr(plain, name)]:
            raise ValueError(f"{idle} has no effect on an organ sweep; leave it out")
        if value.gpus_per_model > 1:
            raise ValueError("`gpus_per_model`: a model of an organ sweep is on one GPU; give 1, or a share of one")
        return value

    @model_validator(mode="after")
    def _nothing_but_checkpoints(self) -> OrganRecipe:
        if self.tracking.upload == "delta":
            raise ValueError("`tracking.upload: delta`: of a model with organs there is none; use `checkpoint` or `none`")
        return self

    def identity(self) -> str:
        """Content hash of all that can change a result: where and how fast it runs, and who is told, cannot."""
        content = self.model_dump(mode="json", exclude={"tracking", "storage", "resources", "ledger"})
        content["numerics"] = [self.resources.dtype, self.resources.batch_size]
        return content_hash(content)

    def to_yaml(self) -> str:
        """For the record: addresses come without the user and password in them."""
        return record_yaml(self)
