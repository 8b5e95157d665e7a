"""Tasks: where examples come from, how they are asked, and what makes an answer right."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from transplant_ray.named_tasks import NAMED_TASKS
from transplant_ray.recipe.part import Part, distinct, one_of

SCORERS = ("exact", "forced", "strict_boxed", "math", "number", "choice", "loss")
REGEX = "regex:"
"""In front of a pattern: the scorer that it makes."""
CHOICE_SCORERS = ("choice", "choice:tokens", "choice:characters")
"""The likeliest choice; by token or by character where one is named."""
Measure = Literal["accuracy", "loss"]
HARNESS = "lm_eval"
"""Scores as a task of lm-evaluation-harness does; `task.lm_eval` says which."""


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
    """Needed where something is decoded; not for `scorer: choice` and `scorer: loss`."""
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
        named = NAMED_TASKS[one_of(str(value["name"]), tuple(NAMED_TASKS), "task")]
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
        return one_of(value, CHOICE_SCORERS if value.startswith("choice:") else SCORERS, "scorer")

    @field_validator("choices")
    @classmethod
    def _several(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple) and len(distinct(value)) < 2:
            raise ValueError("expected two templates or more; a column that holds lists is named without brackets")
        return value

    @property
    def chooses(self) -> bool:
        """Whether choices are read, and nothing is decoded."""
        return self.scorer in CHOICE_SCORERS

    @property
    def measures(self) -> Measure:
        """What its examples are summed up by."""
        return "loss" if self.scorer == "loss" else "accuracy"

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
        reads = self.chooses or self.measures == "loss"
        if reads and (self.stop or self.max_new_tokens is not None):
            raise ValueError(f"`stop` and `max_new_tokens` have no effect with `scorer: {self.scorer}`, which decodes nothing")
        if not reads and self.max_new_tokens is None and self.lm_eval is None:
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
