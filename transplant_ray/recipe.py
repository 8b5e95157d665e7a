"""The recipe: everything a user decides, as frozen pydantic models; unknown keys are refused. `recipe_file` reads one from YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from transplant_ray.named_tasks import NAMED_TASKS

Kind = str
"""`attn`, `ffn`, `all`, or one projection such as `down_proj`."""

Acceptance = Literal["vocabulary", "segmentation", "pickle", "remote_code", "task_code"]

ACTIVATION_RANKERS = frozenset({"lae", "lae_relative"})
"""Rankers that two actors stream statistics for."""
RESIDENT_RANKERS = frozenset({"attribution", "channel", "layers", "leave_one_out", "single", "weight_delta"})
"""Rankers that need both models in one place."""
CHANNEL_RANKERS = frozenset({"attribution", "channel"})
"""Those of them that score every output channel too."""
RANKERS = (*sorted(ACTIVATION_RANKERS | RESIDENT_RANKERS), "depth", "random")
REVERSE = "reverse:"
"""In front of a ranker: its ranking upside down."""
MERGES = ("task_arithmetic", "ties", "dare_ties", "dare_linear")
SPARSE_MERGES = frozenset({"ties", "dare_ties", "dare_linear"})
"""Merges that keep a share of every task vector; mergekit makes them."""
FEWEST_ARMS = 19
"""With fewer, (1 + 0) / (arms + 1) is over 0.05."""
SCORERS = ("exact", "forced", "strict_boxed", "math", "number", "choice")
MAIN = "task"
"""What is being transplanted, among tasks that have names."""
GENERAL_TEXT = "zoo:general.jsonl"
"""Passages of many sorts that come with the package."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"
REGEX = "regex:"
"""In front of a pattern: the scorer that it makes."""
CHOICE_SCORERS = ("choice", "choice:tokens", "choice:characters")
"""The likeliest choice; by token or by character where one is named."""
HARNESS = "lm_eval"
"""Scores as a task of lm-evaluation-harness does; `task.lm_eval` says which."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which would count as 1."""
        expected = cls.model_fields[str(info.field_name)].annotation
        if expected is not bool and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false are not expected here")
        return value


class ModelSpec(Part):
    model: str
    """A folder, a hub id such as `microsoft/Phi-3-mini-4k-instruct`, or `zoo:PAIR/source`."""
    revision: str | None = None
    """Branch, tag or commit; hub models only."""


class HubData(Part):
    path: str
    name: str | None = None
    split: str
    revision: str | None = None


class SplitSpec(Part):
    """Sizes of the three disjoint splits: rank on `probe`, choose on `select`, confirm on `test`."""

    probe: int = Field(128, ge=1)
    select: int = Field(300, ge=1)
    test: int = Field(300, ge=1)
    seed: int = 42


class ShotSpec(Part):
    """Examples that stand before every prompt, rendered by the task's templates and drawn with the seed of its splits."""

    num: int = Field(ge=1)
    separator: str = "\n\n"
    """After each of them. With a chat template they are earlier turns instead."""
    data: str | HubData | None = None
    """Where they are drawn from; by default the task's own rows that are in no split."""


class TaskSpec(Part):
    """A task, spelled out; `name: gsm8k` stands for the settings of a named task, and what is given besides it wins.

    `lm_eval: gsm8k` is a task of lm-evaluation-harness, which brings data, prompts and scores of its own.
    """

    data: str | HubData
    """A JSONL or Parquet file, `zoo:PAIR/tasks/NAME.jsonl`, or a hub dataset."""
    prompt: str
    """Template over the columns of the data, e.g. `"Q: {question}\\nA:"`."""
    answer: str
    """Template of the reference answer."""
    scorer: str = "exact"
    """A name, or `{regex: PATTERN}`, which is kept as `regex:PATTERN`: the one group of the last match is the answer. Or
    `{choice: tokens}` or `{choice: characters}`: log-likelihoods of choices are divided by so many."""
    choices: str | tuple[str, ...] | None = None
    """For `scorer: choice`: the column that holds the list of choices, or a template with it (`" {options}"`), or one template for
    each choice. `answer` is then the text of the right one, its index from 0, or its letter, and the same in all rows."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Needed where something is decoded; not for `scorer: choice`."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion; they are not part of it."""
    chat_template: bool = False
    """Render the prompt as a user message through the target's chat template."""
    system: str | None = None
    """System message; needs `chat_template: true`."""
    shots: ShotSpec | None = None
    lm_eval: str | None = Field(None, min_length=1)
    """Name of a task of lm-evaluation-harness, or the path of a task's YAML file."""
    num_fewshot: int | None = Field(None, ge=0)
    """Of the `lm_eval` task, instead of its own."""
    metric: str | None = None
    """Of the `lm_eval` task: what makes an answer right; by default its first that is 0 or 1 for every example."""
    filter: str | None = None
    """Of the `lm_eval` task: what completions go through; by default its first."""
    split: SplitSpec = SplitSpec()

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("lm_eval") is not None:
            return _of_harness(value)
        if not isinstance(value, dict) or "name" not in value:
            return value
        named = NAMED_TASKS[_one_of(str(value["name"]), tuple(NAMED_TASKS), "task")]
        return named.settings({key: setting for key, setting in value.items() if key != "name"})

    @field_validator("scorer", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) != 1 or not isinstance(next(iter(value.values())), str) or not value.keys() <= {"regex", "choice"}:
            raise ValueError("expected a name, or {regex: PATTERN} with a pattern between quotes, or {choice: tokens}")
        return ":".join(next(iter(value.items())))

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, value: str) -> str:
        if value.startswith(REGEX):
            return REGEX + _pattern(value.removeprefix(REGEX))
        if value == "regex":
            raise ValueError("a pattern is missing: write {regex: 'answer: (.+)'}")
        if value == HARNESS:
            return value
        return _one_of(value, CHOICE_SCORERS if value.startswith("choice:") else SCORERS, "scorer")

    @field_validator("choices")
    @classmethod
    def _several(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple) and len(_distinct(value)) < 2:
            raise ValueError("expected two templates or more; a column that holds lists is named without brackets")
        return value

    @property
    def chooses(self) -> bool:
        """Whether choices are read, and nothing is decoded."""
        return self.scorer in CHOICE_SCORERS

    @model_validator(mode="after")
    def _harness_fits(self) -> TaskSpec:
        if self.lm_eval is None and self.scorer == HARNESS:
            raise ValueError("`scorer: lm_eval` comes with `lm_eval: TASK`")
        idle = [name for name in ("num_fewshot", "metric", "filter") if self.lm_eval is None and getattr(self, name) is not None]
        if idle:
            raise ValueError(f"{idle} has no effect without `lm_eval: TASK`")
        return self

    @model_validator(mode="after")
    def _choices_fit(self) -> TaskSpec:
        if self.chooses != (self.choices is not None):
            raise ValueError("`choices` and `scorer: choice` go together, and one of them is missing")
        if self.chooses and (self.stop or self.max_new_tokens is not None):
            raise ValueError("`stop` and `max_new_tokens` have no effect with `scorer: choice`, which decodes nothing")
        if not self.chooses and self.max_new_tokens is None and self.lm_eval is None:
            raise ValueError("`max_new_tokens` is missing; it has no default")
        return self

    @model_validator(mode="after")
    def _settings_have_effect(self) -> TaskSpec:
        if self.system is not None and not self.chat_template:
            raise ValueError("`system` has no effect without `chat_template: true`")
        if self.chat_template and self.shots is not None and self.shots.separator != ShotSpec.model_fields["separator"].default:
            raise ValueError("`shots.separator` has no effect with `chat_template: true`, where shots are turns")
        if self.stop and self.scorer == "forced":
            raise ValueError("`stop` has no effect with `scorer: forced`, which compares tokens up to the end token")
        return self


class GuardTask(TaskSpec):
    """A task that the transplant should not harm."""

    margin: float = Field(0.05, gt=0, lt=1)
    """Loss of accuracy that is put up with."""
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

    tasks: dict[Annotated[str, Field(pattern=NAME)], GuardTask] = {}
    held_out: str | None = None
    """The task that nothing is fitted on or chosen by; of two or more the last, where none is named."""
    text: TextSpec | None = TextSpec()
    """Where KL(target ‖ variant) is measured; null measures none."""

    @model_validator(mode="after")
    def _held_out_is_there(self) -> GuardSpec:
        if MAIN in self.tasks:
            raise ValueError(f"{MAIN!r} is what the task itself is called; give this guard another name")
        if self.held_out is not None:
            _one_of(self.held_out, tuple(self.tasks), "guard")
        return self

    @property
    def spared(self) -> str | None:
        """The guard that is held out."""
        return self.held_out or (list(self.tasks)[-1] if len(self.tasks) > 1 else None)

    @property
    def choosing(self) -> tuple[str, ...]:
        """Guards that may be fitted on and chosen by."""
        return tuple(name for name in self.tasks if name != self.spared)


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
            _one_of(ranker.removeprefix(REVERSE), RANKERS, "ranker")
        return _distinct(value)

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
        return _grid_axis(value)

    @field_validator("merges")
    @classmethod
    def _known_merges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct([_one_of(merge, MERGES, "merge") for merge in value])

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
    """Points of accuracy that are given up for a point that the guards lose, on average."""
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
        if self.screen is not None or self.race is not None:
            raise ValueError("`screen` and `race` choose among trials, and `primary` names the winner beforehand; drop one of them")
        return self

    @field_validator("channels")
    @classmethod
    def _each_once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _distinct(value)

    @field_validator("k", "kind", "alpha")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _grid_axis(value)

    @field_validator("alpha")
    @classmethod
    def _in_range(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        outside = [alpha for alpha in value if not 0 < alpha <= 1]
        if 0 in value:
            raise ValueError("0 is the target itself, which is in every sweep")
        if outside and not info.data.get("extrapolate"):
            raise ValueError(f"{outside[0]:g} is outside (0, 1]; add `sweep.extrapolate: true` if that is meant")
        return value


class _Penalised(Part):
    """A search that weighs what is gained on the task against what is lost on guards."""

    penalty: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.3, 1.0, 3.0)
    """λ, one result each: how many nats of task loss a nat of guard loss is worth. Only 0 has an effect where nothing guards."""
    kind: Kind = "all"
    """Modules that may change."""

    @field_validator("penalty")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _grid_axis(value)


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
                _one_of(str(name), SEARCHES, "search")
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a name, a list of names, or a mapping name → settings; names are {list(SEARCHES)}")
        return {_one_of(name, SEARCHES, "search"): {} for name in _distinct(names)}

    @model_validator(mode="after")
    def _some(self) -> SearchSpec:
        if self.gates is None and self.greedy is None:
            raise ValueError(f"names no search; expected some of {list(SEARCHES)}, or no `search` at all")
        return self

    @property
    def wanted(self) -> dict[str, GatesSpec | GreedySpec]:
        """Name → settings."""
        both = {"gates": self.gates, "greedy": self.greedy}
        return {name: spec for name, spec in both.items() if spec is not None}


class ResourceSpec(Part):
    address: str | None = None
    """Address of a Ray cluster; without one Ray starts in this process (or `RAY_ADDRESS` is joined)."""
    gpus_per_model: float = Field(0, ge=0)
    """GPUs of each model actor; fractions share one GPU, 0 runs on CPU."""
    cpus_per_model: float = Field(1, gt=0)
    evaluators: int = Field(1, ge=1)
    """Resident pairs that evaluate side by side."""
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
    def _rungs_have_effect(self) -> Recipe:
        race, select = self.sweep.race, self.task.split.select
        if race is not None and race.rungs[-1] >= select:
            raise ValueError(f"`sweep.race`: rung {race.rungs[-1]} has no effect, for there are {select} select examples")
        return self

    def identity(self) -> str:
        """Content hash of all that can change a result: where and how fast it runs, and who is told, cannot."""
        content = self.model_dump(mode="json", exclude={"tracking", "storage", "resources"})
        content["numerics"] = [self.resources.dtype, self.resources.batch_size, self.resources.shard_size]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """For the record: addresses come without the user and password in them."""
        content = self.model_dump(mode="json")
        content["storage"], content["tracking"]["uri"] = redact(self.storage), redact(self.tracking.uri)
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if "\x85" in text:  # PyYAML writes this line end as it is, and reads it back as another
            text = yaml.safe_dump(content, sort_keys=False)
        return text


def redact(address: str) -> str:
    """An address without the user and password in it."""
    return re.sub(r"//[^/\s]*@", "//", address)


def _of_harness(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a task that brings its own data, prompts and scores."""
    own: dict[str, Any] = {"data": "", "prompt": "", "answer": "", "scorer": HARNESS}
    others = {"name": None, "stop": None, "choices": None, "shots": None}
    idle = [name for name, value in (own | others).items() if given.get(name) not in (None, [], (), value)]
    if idle:
        raise ValueError(f"{idle} has no effect with `lm_eval`: its task brings its own")
    return given | own


def _pattern(text: str) -> str:
    import regex  # type: ignore[import-untyped]  # it matches, for it can be given a time limit; a recipe without patterns needs none

    try:
        groups = re.compile(text).groups
        regex.compile(text)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern is no regular expression ({error})") from error
    if groups != 1:
        raise ValueError(f"the pattern has {groups} groups, expected one, around the answer; (?:…) groups without counting")
    return text


def _one_of(value: str, known: Sequence[str], what: str) -> str:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise ValueError(f"unknown {what} {value!r}; expected one of {list(known)}{f' (nearest: {near[0]})' if near else ''}")
    return value


def _grid_axis(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("at least one value is needed")
    return _distinct(values)


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{list(values)} has a value twice")
    return tuple(values)
