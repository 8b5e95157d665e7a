"""Named tasks: a name stands for settings, what is given wins, and the columns of the data render."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from transplant_ray.evaluate.scorers import find_scorer
from transplant_ray.evaluate.task import make_example
from transplant_ray.named_tasks import NAMED_TASKS
from transplant_ray.recipe import HubData, SplitSpec, TaskSpec

ROWS: dict[str, dict[str, Any]] = {
    "math500": {
        "problem": r"Let $S = \{1, {2}\}$. What is {answer}?", "answer": r"\frac{1}{2}",
        "solution": r"It is $\boxed{\frac{1}{2}}$.", "subject": "Algebra", "level": 3, "unique_id": "test/algebra/1.json",
    },
    "gsm8k": {"question": "How much are 2 {eggs} at $3?", "answer": "2 * 3 = <<2*3=6>>6 dollars.\n#### 6"},
}  # fmt: skip


def spec(name: str, **given: Any) -> TaskSpec:
    return TaskSpec.model_validate({"name": name, "max_new_tokens": 8, **given})


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", NAMED_TASKS)
def test_every_task_renders_its_columns_and_scores_its_own_answer(name: str, chat: bool) -> None:
    row, task = ROWS[name], spec(name, chat_template=chat)
    example = make_example(row, task, "here")
    assert example.prompt.count(row[NAMED_TASKS[name].columns[0]]) == 1
    assert row["answer"] in example.answer
    assert find_scorer(task.scorer)(row.get("solution", row["answer"]), example.answer).correct
    assert set(NAMED_TASKS[name].columns) <= row.keys()


def test_the_hub_has_them_under_these_names() -> None:
    assert spec("math500").data == HubData(path="HuggingFaceH4/MATH-500", split="test")
    assert spec("gsm8k").data == HubData(path="openai/gsm8k", name="main", split="test")


@pytest.mark.parametrize(("name", "rows"), [("math500", 500), ("gsm8k", 1319)])
def test_the_splits_fit_into_the_data(name: str, rows: int) -> None:
    split = spec(name).split
    assert split.probe + split.select + split.test <= rows


def test_the_instruction_is_the_system_message_of_a_chat_and_else_part_of_the_prompt() -> None:
    system = NAMED_TASKS["math500"].system
    assert system is not None
    row = ROWS["math500"]
    plain, chat = spec("math500"), spec("math500", chat_template=True)
    assert (plain.system, make_example(row, plain, "").prompt) == (None, f"{system}\n\n{row['problem']}\n")
    assert (chat.system, make_example(row, chat, "").prompt) == (system, row["problem"])


def test_a_chat_template_without_system_messages_gets_the_instruction_in_the_users() -> None:
    task = spec("math500", chat_template=True, system=None)
    assert task.system is None
    assert task.prompt == spec("math500").prompt


def test_what_is_given_wins() -> None:
    given = {
        "data": "/d.jsonl",
        "prompt": "{question}",
        "answer": "{a}",
        "scorer": "exact",
        "stop": [],
        "system": "x",
        "chat_template": True,
    }
    task = spec("gsm8k", **given)
    assert {key: getattr(task, key) for key in given} == {**given, "stop": ()}
    assert spec("math500", split={"seed": 7}).split == SplitSpec(probe=50, select=200, test=250, seed=7)
    assert spec("gsm8k", scorer={"regex": "#### (.+)"}).scorer == "regex:#### (.+)"


def test_forced_has_nothing_to_stop_at() -> None:
    assert spec("gsm8k").stop
    assert spec("gsm8k", scorer="forced").stop == ()


@pytest.mark.parametrize("name", NAMED_TASKS)
def test_a_name_is_what_it_stands_for(name: str) -> None:
    named = spec(name)
    assert TaskSpec.model_validate(named.model_dump(mode="json")) == named


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gsm8", r"unknown task 'gsm8'; expected one of \['math500', 'gsm8k'\] \(nearest: gsm8k\)"),
        (None, "None"),
        (["gsm8k"], "unknown task"),
    ],
)
def test_an_unknown_name_is_refused(name: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(name)


def test_a_name_does_not_say_how_long_answers_may_be() -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        TaskSpec.model_validate({"name": "gsm8k"})
