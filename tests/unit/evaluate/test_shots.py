"""Shots: examples that stand before every prompt and are in no split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import BOS, tiny_tokenizer

from transplant_ray.errors import DataError
from transplant_ray.evaluate.task import Task, load_task, tokenize
from transplant_ray.recipe import TaskSpec

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "options": [str(n + 1), "no"]} for n in range(12)]
SIZES = {"probe": 2, "select": 3, "test": 4, "seed": 1}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec(tmp_path: Path, shots: dict[str, Any] | None, **changes: Any) -> TaskSpec:
    data = write(tmp_path / "rows.jsonl", ROWS)
    given = {"data": data, "prompt": "{prompt}", "answer": " {answer}", "max_new_tokens": 4, "split": SIZES, "shots": shots}
    return TaskSpec.model_validate({**given, **changes})


def ids(task: Task) -> list[list[str]]:
    return [[example.id for example in split] for split in (task.probe, task.select, task.test)]


def texts(task: Task, of: TaskSpec, template: str | None = None) -> dict[str, str]:
    """Own prompt → what the model is given."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rendered = tokenize(task.test, of, tokenizer, task.shots)
    assert all(of.chat_template or r.prompt_ids[0] == BOS for r in rendered)
    decoded = [tokenizer.decode(r.prompt_ids, skip_special_tokens=True) for r in rendered]
    return dict(zip((example.prompt for example in task.test), decoded, strict=True))


@pytest.mark.parametrize("num", [1, 3])
def test_shots_are_rows_of_no_split_and_change_no_split(tmp_path: Path, num: int) -> None:
    plain, shot = load_task(spec(tmp_path, None)), load_task(spec(tmp_path, {"num": num}))
    assert ids(plain) == ids(shot)
    assert (len(plain.shots), len(shot.shots)) == (0, num)
    assert not {e.prompt for e in shot.shots} & {e.prompt for split in (shot.probe, shot.select, shot.test) for e in split}
    other = load_task(spec(tmp_path, {"num": num}, split={**SIZES, "seed": 2}))
    assert other.shots != shot.shots


def test_shots_stand_before_every_prompt(tmp_path: Path) -> None:
    of = spec(tmp_path, {"num": 2, "separator": "\n. "})
    task = load_task(of)
    first, second = task.shots
    before = f"{first.prompt}{first.answer}\n. {second.prompt}{second.answer}\n. "
    assert texts(task, of) == {example.prompt: before + example.prompt for example in task.test}


def test_in_a_chat_shots_are_earlier_turns(tmp_path: Path) -> None:
    of = spec(tmp_path, {"num": 1}, chat_template=True, system="be short")
    task = load_task(of)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}a:"
    (shot,) = task.shots
    before = f"system:be short\nuser:{shot.prompt}\nassistant:{shot.answer}\nuser:"
    assert texts(task, of, template) == {example.prompt: f"{before}{example.prompt}\na:" for example in task.test}


def test_shots_of_choices_show_the_right_one(tmp_path: Path) -> None:
    of = spec(tmp_path, {"num": 2}, scorer="choice", choices=" {options}", max_new_tokens=None)
    task = load_task(of)
    before = "".join(f"{shot.prompt} {eval(shot.prompt[:-1])}\n\n" for shot in task.shots)  # the answer of a sum
    assert texts(task, of) == {example.prompt: before + example.prompt for example in task.test}


def test_shots_come_from_data_of_their_own(tmp_path: Path) -> None:
    others = [{"prompt": f"{n}+2=", "answer": str(n + 2)} for n in range(5)]
    task = load_task(spec(tmp_path, {"num": 4, "data": write(tmp_path / "shots.jsonl", others)}))
    assert {example.prompt for example in task.shots} < {row["prompt"] for row in others}
    assert ids(task) == ids(load_task(spec(tmp_path, None)))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    load_task(spec(tmp_path, {"num": 3}))
    with pytest.raises(DataError, match=r"`task.shots`: 3 rows are in no split, and 4 shots are asked for"):
        load_task(spec(tmp_path, {"num": 4}))
    few = write(tmp_path / "shots.jsonl", [{"prompt": "x", "answer": "y"}])
    with pytest.raises(DataError, match=r"shots\.jsonl: 1 rows"):
        load_task(spec(tmp_path, {"num": 2, "data": few}))


def test_a_shot_that_is_an_example_is_refused(tmp_path: Path) -> None:
    shown = load_task(spec(tmp_path, None)).test[0]
    same = write(tmp_path / "shots.jsonl", [{"prompt": shown.prompt, "answer": "another answer"}])
    with pytest.raises(DataError, match="is an example of a split"):
        load_task(spec(tmp_path, {"num": 1, "data": same}))
    unused = load_task(spec(tmp_path, {"num": 1})).shots[0]
    load_task(spec(tmp_path, {"num": 1, "data": write(tmp_path / "shots.jsonl", [{"prompt": unused.prompt, "answer": "x"}])}))
