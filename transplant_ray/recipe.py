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
RANKERS = (*sorted(ACTIVATION_RANKERS | RESIDENT_RANKERS), "depth", "random")
REVERSE = "reverse:"
"""In front of a ranker: its ranking upside down."""
FEWEST_ARMS = 19
"""With fewer, (1 + 0) / (arms + 1) is over 0.05."""
SCORERS = ("exact", "forced", "strict_boxed", "math", "number", "choice")
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

    @field_validator("alpha")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _grid_axis(value)


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


class SweepSpec(Part):
    """The grid: ranker × kind × K × alpha."""

    k: tuple[Annotated[int, Field(ge=1)], ...]
    kind: tuple[Kind, ...] = ("all",)
    extrapolate: bool = False
    """Allow coefficients outside [0, 1]."""
    alpha: tuple[float, ...] = Field((1.0,), validate_default=True)
    """Coefficient of the chosen modules, in (0, 1]; 1 is the hard transplant."""
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
    task: TaskSpec
    rank: RankSpec = RankSpec()
    sweep: SweepSpec
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
