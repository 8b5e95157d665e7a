"""The whole recipe, and where and how it runs."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from transplant_ray.addresses import redact_address
from transplant_ray.recipe.guards import GuardSpec
from transplant_ray.recipe.part import Part
from transplant_ray.recipe.ranking import CHANNEL_RANKERS, RankSpec
from transplant_ray.recipe.search import SearchSpec
from transplant_ray.recipe.sweep import MERGES, SweepSpec
from transplant_ray.recipe.tasks import TaskSpec

CARRIED = "carried"
"""Folder of the inputs that travel with a recipe, each in one that is named for its content."""
_BEFORE_CARRIED = re.compile(rf'"[^"]*/({CARRIED}/[0-9a-f]{{64}}/)')
Place = Literal["source", "target", "evaluator"]
"""Whose labels: those of the actor that holds the source, of the one that holds the target, of resident pairs."""
Acceptance = Literal["vocabulary", "segmentation", "pickle", "remote_code", "task_code"]


class ModelSpec(Part):
    model: str
    """A folder, a hub id such as `microsoft/Phi-3-mini-4k-instruct`, or `zoo:PAIR/source`."""
    revision: str | None = None
    """Branch, tag or commit; hub models only."""


class ResourceSpec(Part):
    address: str | None = None
    """Address of a Ray cluster; without one Ray starts in this process (or `RAY_ADDRESS` is joined)."""
    gpus_per_model: float = Field(0, ge=0)
    """GPUs of each model actor; fractions share one GPU, 0 runs on CPU."""
    cpus_per_model: float = Field(1, gt=0)
    evaluators: int | Literal["auto"] = 1
    """Resident pairs that evaluate side by side; `auto`: as many as there is room for, while nodes join and leave."""
    labels: dict[Place, dict[str, str]] = Field(default_factory=dict)
    """Node labels that `source`, `target` or `evaluator` asks for, for example `{source: {role: source}}`."""
    accelerator_type: str | None = None
    """Kind of GPU that every model actor asks for, as Ray names it, for example `H100`."""
    wait: float = Field(0, ge=0)
    """Seconds to wait for nodes where the cluster has no room yet: for one that grows when it is asked to."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int | Literal["auto"] = "auto"
    """Rows per forward pass; `auto` measures at the start how many the device likes. A number makes runs repeat bit for bit."""
    shard_size: int = Field(128, ge=1)
    """Examples per unit of work that is handed to an evaluator."""

    @field_validator("batch_size", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError("expected a number of rows, 1 or more, or `auto`")
        return value

    @field_validator("evaluators", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError("expected a number of evaluators, 1 or more, or `auto`")
        return value

    @model_validator(mode="after")
    def _accelerators_are_used(self) -> ResourceSpec:
        if self.accelerator_type is not None and self.gpus_per_model == 0:
            raise ValueError("`accelerator_type` has no effect without `gpus_per_model`")
        return self

    @field_validator("gpus_per_model")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value} GPUs: Ray shares fractions of one GPU, or gives whole ones")
        return value


class TrackingSpec(Part):
    uri: str = "sqlite:///mlflow.db"
    experiment: str = "transplant"
    upload: Literal["checkpoint", "delta", "none"] = "checkpoint"
    """What of the winner becomes an artifact of its run."""
    patience: float = Field(600, ge=0)
    """Seconds that a finished sweep waits for a server that does not answer; while the sweep runs it never minds."""


class Recipe(Part):
    """Everything a user decides about a sweep; `load_recipe` reads one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    source: ModelSpec
    target: ModelSpec
    base: ModelSpec | None = None
    """What source and target were both trained from; `sweep.controls.merges` need it."""
    task: TaskSpec
    rank: RankSpec = RankSpec()
    guards: GuardSpec = GuardSpec()
    sweep: SweepSpec
    search: SearchSpec | None = None
    """Variants that are fitted, beside those of the grid."""
    resources: ResourceSpec = ResourceSpec()
    tracking: TrackingSpec = TrackingSpec()
    storage: str = "runs"
    """Results go to `<storage>/<name>/`: a folder, or an object store such as `s3://bucket/runs`."""
    ledger: bool = True
    """Whether outcomes that are known under this storage are taken from its ledger, and new ones kept in it."""
    accept: tuple[Acceptance, ...] = ()
    """What is otherwise refused: other vocabularies, other segmentation, pickle checkpoints, code of a model or a task."""

    @model_validator(mode="after")
    def _primary_is_ranked(self) -> Recipe:
        primary = self.sweep.primary
        if primary is not None and primary.by not in self.rank.by:
            raise ValueError(f"`sweep.primary.by` is {primary.by!r}, which is not in `rank.by` {list(self.rank.by)}")
        return self

    @model_validator(mode="after")
    def _channels_are_ranked(self) -> Recipe:
        if self.sweep.channels and not CHANNEL_RANKERS & self.rank.measured:
            raise ValueError(f"`sweep.channels` needs a ranker that scores channels: one of {sorted(CHANNEL_RANKERS)} in `rank.by`")
        return self

    @model_validator(mode="after")
    def _penalties_are_paid(self) -> Recipe:
        guarded = bool(self.guards.choosing) or self.guards.text is not None
        for name, spec in {} if self.search is None or guarded else self.search.wanted.items():
            if any(spec.penalty):
                raise ValueError(
                    f"`search.{name}.penalty` has no effect: there is neither a guard that is not held out nor general text to "
                    f"lose on; add one, or use `search.{name}.penalty: [0]`"
                )
        return self

    @model_validator(mode="after")
    def _guards_decide(self) -> Recipe:
        if self.sweep.objective is not None and not self.guards.choosing:
            raise ValueError("`sweep.objective` weighs guards, and there is none that is not held out; add one to `guards.tasks`")
        measures = {self.guards.tasks[name].measures for name in self.guards.choosing}
        if self.sweep.objective is not None and self.sweep.objective.price and len(measures) > 1:
            raise ValueError(
                "`sweep.objective.price` is one exchange rate, and of the guards some lose points and others nats: hold one out, "
                "or use `sweep.objective.veto`, for which each guard has a `margin` of its own"
            )
        return self

    @model_validator(mode="after")
    def _base_is_merged(self) -> Recipe:
        merges = list(self.sweep.controls.merges)
        if merges and self.base is None:
            raise ValueError(
                f"`sweep.controls.merges` {merges} need a `base`: the model that source and target were both trained from"
            )
        if self.base is not None and not merges:
            raise ValueError(f"`base` has no effect without `sweep.controls.merges`, for example {list(MERGES[:1])}")
        return self

    @model_validator(mode="after")
    def _screen_has_effect(self) -> Recipe:
        if self.sweep.screen is not None and self.task.measures == "loss":
            raise ValueError("`sweep.screen` has no effect with `scorer: loss`, whose score is that loss; use `sweep.race`")
        return self

    @model_validator(mode="after")
    def _rungs_have_effect(self) -> Recipe:
        race, select = self.sweep.race, self.task.split.select
        if race is not None and race.rungs[-1] >= select:
            raise ValueError(f"`sweep.race`: rung {race.rungs[-1]} has no effect, for there are {select} select examples")
        return self

    def identity(self) -> str:
        """Content hash of all that can change a result: where and how fast it runs, and who is told, cannot."""
        content = self.model_dump(mode="json", exclude={"tracking", "storage", "resources", "ledger"})
        content["numerics"] = [self.resources.dtype, self.resources.batch_size, self.resources.shard_size]
        return content_hash(content)

    def to_yaml(self) -> str:
        """For the record: addresses come without what is secret in them."""
        return record_yaml(self)


def content_hash(content: dict[str, Any]) -> str:
    """An input that travelled with a recipe counts by its content, not by where Ray unpacked it: that changes with every head."""
    text = _BEFORE_CARRIED.sub(r'"\1', json.dumps(content, sort_keys=True))
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(recipe: Part, **dump: Any) -> dict[str, Any]:
    """What a recipe with `storage` and `tracking` says, as JSON has it; its addresses are as they may be shown."""
    content = recipe.model_dump(mode="json", **dump)
    content["storage"] = redact_address(content["storage"])
    content["tracking"]["uri"] = redact_address(content["tracking"]["uri"])
    return content


def record_yaml(recipe: Part) -> str:
    """A recipe with `storage` and `tracking` as YAML, for the record."""
    content = recorded(recipe)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if "\x85" in text:  # PyYAML writes this line end as it is, and reads it back as another
        text = yaml.safe_dump(content, sort_keys=False)
    return text
