r"""Tasks that people use, by name: `task: {name: gsm8k, max_new_tokens: 256}` in a recipe, `--task gsm8k` on the command line.

A name stands for settings of `task`; whatever is given besides the name wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class NamedTask:
    data: Mapping[str, str]
    """The hub dataset, as `task.data` names one."""
    prompt: str
    """Template of the plain prompt, with whatever instruction the task needs."""
    chat_prompt: str
    """Template of the user's message where there is a chat template; the instruction is the system's message."""
    answer: str
    """Template of the reference answer."""
    scorer: str
    columns: tuple[str, ...]
    """What a row is known by where it has no id."""
    system: str | None = None
    stop: tuple[str, ...] = ()
    split: Mapping[str, int] = field(default_factory=dict)
    """Sizes, where the default ones need more rows than there are."""

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of `task`: those that are given, and the task's own for the others.

        `system: null` is for chat templates that know no system message: the instruction is then part of the user's.
        """
        chat = given.get("chat_template") is True and not (self.system and given.get("system", self.system) is None)
        own: dict[str, Any] = {"data": dict(self.data), "answer": self.answer, "scorer": self.scorer, "split": dict(self.split)}
        own["prompt"] = self.chat_prompt if chat else self.prompt
        if chat:
            own["system"] = self.system
        if given.get("scorer") != "forced":  # it compares up to the end token, and refuses to stop elsewhere
            own["stop"] = list(self.stop)
        split = given.get("split")
        return {**own, **given, **({"split": {**self.split, **split}} if isinstance(split, dict) else {})}


_SOLVER = "You solve mathematical problems with care, one step at a time. Give nothing but the final answer, in \\boxed{}."
"""After the instruction of Kim et al. 2026, section 4: a careful solver, step by step, only the final answer, boxed."""

NAMED_TASKS: Mapping[str, NamedTask] = MappingProxyType(
    {
        "math500": NamedTask(
            data={"path": "HuggingFaceH4/MATH-500", "split": "test"},
            prompt=_SOLVER.replace("{}", "{{}}") + "\n\n{problem}\n",
            chat_prompt="{problem}",
            system=_SOLVER,
            answer="\\boxed{{{answer}}}",
            scorer="math",
            columns=("problem",),
            split={"probe": 50, "select": 200, "test": 250},
        ),
        "gsm8k": NamedTask(
            data={"path": "openai/gsm8k", "name": "main", "split": "test"},
            prompt="Question: {question}\nAnswer:",
            chat_prompt="{question}",
            answer="{answer}",
            scorer="number",
            columns=("question",),
            stop=("Question:",),  # a base model goes on with the next one
        ),
    }
)
