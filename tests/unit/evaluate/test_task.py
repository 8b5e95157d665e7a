"""Tasks: rows become examples, prompts become tokens, splits stay apart; whatever does not fit is refused by its place."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, EOS, tiny_tokenizer, write_task

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate.example import Example, Rendered, check_lengths
from transplant_ray.evaluate.task import (
    check_apart,
    load_passages,
    load_task,
    make_example,
    read_data,
    render,
    split_examples,
    tokenize,
)
from transplant_ray.recipe import HubData, SplitSpec, TaskSpec, TextSpec

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n} for n in range(12)]
SIZES = {"probe": 2, "select": 3, "test": 4, "seed": 1}


def spec(data: Path | str, **changes: Any) -> TaskSpec:
    given = {"data": str(data), "prompt": "{prompt}", "answer": "{answer}", "max_new_tokens": 4, "split": SIZES, **changes}
    return TaskSpec.model_validate(given)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_read_from_both_formats_alike(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    assert read_data(str(path)) == ROWS
    task = load_task(spec(path, prompt="level {level}: {prompt}"))
    read = {(example.prompt, example.answer) for split in ("probe", "select", "test") for example in task[split]}
    assert len(read) == 9
    assert read < {(f"level {row['level']}: {row['prompt']}", row["answer"]) for row in ROWS}


def test_the_zoo_is_read_by_name() -> None:
    rows = read_data("zoo:cross-generation/tasks/lost.jsonl")
    assert len(rows) >= 900
    assert {"prompt", "answer"} <= rows[0].keys()
    for name in ("zoo:cross-generation/tasks/nothing.jsonl", "zoo:../errors.py"):
        with pytest.raises(RecipeError, match="the zoo has no such file"):
            read_data(name)


def test_json_strings_may_hold_any_line_separator(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x1cb", "a\nb\r\nc"]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in texts])
    assert [row["prompt"] for row in read_data(str(path))] == texts


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert read_data(str(path)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n{"a": \n', r"rows.jsonl, line 2: not JSON .*Expected one object a line"),
        ('{"a": 1}\n\n[1, 2]\n', "rows.jsonl, line 3: found list, expected one JSON object a line"),
        ("3\n", "line 1: found int"),
        ("null\n", "line 1: found NoneType"),
        ('"text"', "line 1: found str"),
        ("[" * 100_000, "line 1: not JSON"),
        ("", "rows.jsonl: holds no rows"),
        ("\n \n", "rows.jsonl: holds no rows"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_data(str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"a": "\xff"}', "cannot be read as UTF-8 text"),
        ("rows.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("rows.parquet", b"", "not a readable Parquet file"),
        ("rows.csv", b"a,b\n", r"\.csv is not read; expected one of \.jsonl, \.parquet"),
        ("rows", b"{}", "no suffix is not read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {words}"):
        read_data(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=rf"{path}: no such file\. Give a \.jsonl or \.parquet file"):
            read_data(str(path))


# Hub datasets, here from a folder: `datasets` reads both alike.


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS)
    return folder


def test_a_hub_dataset_is_read_by_path_and_split(dataset: Path) -> None:
    assert read_data(HubData(path=str(dataset), split="train")) == ROWS


@pytest.mark.parametrize(("changes", "words"), [({"split": "tets"}, "tets"), ({"name": "none"}, "none"), ({"path": "x/y"}, "x/y")])
def test_a_hub_dataset_that_is_not_there_is_refused(dataset: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(DataError, match=rf"the hub dataset cannot be loaded .*{words}.*Check path, name, split and network"):
        read_data(HubData.model_validate({"path": str(dataset), "split": "train", **changes}))


def test_a_broken_hub_dataset_is_refused(dataset: Path) -> None:
    (dataset / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(DataError, match="the hub dataset cannot be loaded"):
        read_data(HubData(path=str(dataset), split="train"))


def test_an_empty_hub_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transplant_ray.rows.hub_rows", lambda _: [])
    with pytest.raises(DataError, match="some/dataset: holds no rows"):
        read_data(HubData(path="some/dataset", split="train"))


# Templates.


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {prompt}\nA:", "Q: 0+1=\nA:"),
        ("{prompt}{answer} at {level}", "0+1=1 at 0"),
        ("\\boxed{{{answer}}}", "\\boxed{1}"),
        ("{{prompt}}", "{prompt}"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_templates_are_filled_from_columns(template: str, text: str) -> None:
    assert render(template, ROWS[0], "here") == text


def test_what_a_column_holds_is_never_read_as_a_template() -> None:
    assert render("{a}{b}", {"a": "{b}", "b": "{{x}} {0.__class__}"}, "here") == "{b}{{x}} {0.__class__}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{promt}", r"no column 'promt'; columns are prompt, answer, level\. Did you mean \{prompt\}\?"),
        ("{prompt.upper}", r"no column 'prompt\.upper'"),
        ("{prompt.__class__.__mro__}", "no column"),
        ("{level[0]}", r"no column 'level\[0\]'"),
        ("{}", "no column ''"),
        ("{0}", "no column '0'"),
        ("{prompt", r"the template '\{prompt' is malformed .*Write \{\{ for a brace"),
        ("prompt}", "the template .* malformed"),
        ("{prompt!r}", "the template .* malformed .*'prompt' has a format of its own"),
        ("{level:03d}", "the template .* malformed .*'level' has a format of its own"),
        ("{level:{answer}}", "the template .* malformed"),
    ],
)
@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_a_template_that_does_not_fit_is_refused(tmp_path: Path, part: str, template: str, words: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=rf"rows.jsonl, row 1, `{part}`: {words}"):
        load_task(spec(path, **{part: template}))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "answer": None}, "row 13, `answer`: column 'answer' is empty"),
        ({"prompt": None, "answer": "a"}, "row 13, `prompt`: column 'prompt' is empty"),
        ({"prompt": "q", "answer": "  \n"}, "row 13: the reference answer is empty"),
        ({"prompt": "q"}, "row 13, `answer`: no column 'answer'; columns are prompt"),
        ({"prompt": "3+1=", "answer": "5"}, r"rows.jsonl: 1 duplicate examples, e\.g\. '3\+1=' is there 2 times"),
        (ROWS[3], "1 duplicate examples"),
    ],
)
def test_a_row_that_spoils_the_data_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=words):
        load_task(spec(path))


def test_columns_may_hold_more_than_text() -> None:
    row = {"n": 3, "x": 1.5, "yes": True, "list": [1, "a"]}
    assert render("{n} {x} {yes} {list}", row, "here") == "3 1.5 True [1, 'a']"


def test_too_few_rows_for_the_splits_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:8])
    with pytest.raises(DataError, match=r"8 examples, the splits need 9 \(2 probe \+ 3 select \+ 4 test\)"):
        load_task(spec(path))
    assert load_task(spec(write_rows(path, ROWS[:9])))


# Splits.


def examples(num: int) -> list[Example]:
    return [make_example({"q": f"question {i}"}, spec("-", prompt="{q}", answer="{q}!"), "here") for i in range(num)]


SPLITS = st.builds(
    SplitSpec, probe=st.integers(1, 9), select=st.integers(1, 9), test=st.integers(1, 9), seed=st.integers(-3, 10**12)
)


@settings(max_examples=50, deadline=None)
@given(SPLITS, st.integers(0, 20), st.randoms(use_true_random=False))
def test_splits_are_disjoint_and_do_not_depend_on_the_order_of_the_file(sizes: SplitSpec, more: int, rng: random.Random) -> None:
    rows = examples(sizes.probe + sizes.select + sizes.test + more)
    task = split_examples(rows, sizes, "here")
    assert [len(task[split]) for split in ("probe", "select", "test")] == [sizes.probe, sizes.select, sizes.test]
    chosen = [example.id for split in ("probe", "select", "test") for example in task[split]]
    assert len(set(chosen)) == len(chosen)
    assert split_examples(rng.sample(rows, len(rows)), sizes, "here") == task


def test_splits_depend_on_the_seed() -> None:
    rows = examples(40)
    tasks = [split_examples(rows, SplitSpec(probe=5, select=5, test=5, seed=seed), "here") for seed in range(5)]
    assert len({task.probe for task in tasks}) == 5
    assert len({frozenset(e.id for e in task.test) for task in tasks}) == 5


def test_an_example_is_known_by_its_content() -> None:
    first = make_example(ROWS[0], spec("-"), "here")
    assert make_example({**ROWS[0], "level": "other"}, spec("-"), "there") == first
    others = [spec("-", prompt="{prompt} "), spec("-", answer="{answer}0"), spec("-", prompt="{prompt}{answer}", answer="1")]
    assert len({first.id, *(make_example(ROWS[0], other, "here").id for other in others)}) == 4


# Tokens.


def test_a_prompt_gets_the_tokenizers_own_special_tokens_and_an_answer_its_end(tmp_path: Path) -> None:
    task = load_task(spec(write_task(tmp_path / "task.jsonl")))
    tokenizer = tiny_tokenizer()
    for example, rendered in zip(task.probe, tokenize(task.probe, spec("-"), tokenizer), strict=True):
        assert rendered.id == example.id
        assert rendered.prompt_ids[0] == BOS
        assert tokenizer.decode(rendered.prompt_ids[1:]) == example.prompt
        assert rendered.answer_ids[-1] == EOS
        assert tokenizer.decode(rendered.answer_ids[:-1]) == example.answer == rendered.answer


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize(
    ("system", "text"),
    [(None, "user: 0+1=\na:"), ("be short", "system: be short\nuser: 0+1=\na:"), ("", "system: \nuser: 0+1=\na:")],
)
def test_a_chat_template_renders_the_prompt_as_a_user_message(system: str | None, text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    example = make_example(ROWS[0], spec("-"), "here")
    (rendered,) = tokenize([example], spec("-", chat_template=True, system=system), tokenizer)
    assert tokenizer.decode(rendered.prompt_ids) == text  # and no <s> in front: that is the template's business
    assert tokenize([example], spec("-"), tokenizer) == tokenize([example], spec("-"), tiny_tokenizer())


def test_a_chat_template_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"`task.chat_template: true`: the target's tokenizer has no chat template"):
        tokenize(examples(1), spec("-", chat_template=True), tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "system", "hint"),
    [
        (STRICT + CHAT, "be short", "say `task.system=null`"),
        ("{% broken", "be short", "say `task.system=null`"),
        ("{{ messages.nothing.at_all }}", None, "Set it to false"),
    ],
)
def test_a_chat_template_that_refuses_the_messages_is_told(template: str, system: str | None, hint: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"the target's chat template refuses the messages .*\. .*{hint}"):
        tokenize(examples(1), spec("-", chat_template=True, system=system), tokenizer)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    (example,) = examples(1)
    with pytest.raises(DataError, match=f"example {example.id}: the prompt is empty after tokenization"):
        tokenize([example], spec("-", chat_template=True), tokenizer)


def test_a_tokenizer_without_an_end_token_ends_no_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (rendered,) = tokenize([make_example(ROWS[0], spec("-"), "here")], spec("-"), tokenizer)
    assert tokenizer.decode(rendered.answer_ids) == "1"


def test_a_prompt_must_leave_room_for_its_completion() -> None:
    short, long = (Rendered(name, (5,) * length, (6,), "x") for name, length in (("short", 3), ("long", 10)))
    check_lengths([long, short], 6, 16)
    check_lengths([long, short], 600, None)
    with pytest.raises(DataError, match=r"example long: 10 prompt tokens \+ 7 new ones exceed the model's 16 positions"):
        check_lengths([short, long], 7, 16)


# Guards and general text.


def test_tasks_that_share_a_prompt_are_refused_by_both_their_names() -> None:
    check_apart({"task": ["a", "b", "c"], "g": ["d", "e", "f"]})
    with pytest.raises(DataError, match=r"`guards\.tasks\.h`: 2 of its 3 prompts are prompts of `g`, e\.g\. 'e'"):
        check_apart({"task": ["a", "b", "c"], "g": ["d", "e", "f"], "h": ["x", " e", "f"]})


def text_spec(data: Path, **changes: Any) -> TextSpec:
    return TextSpec.model_validate({"data": str(data), "tokens": 5, "split": SIZES, **changes})


def test_passages_are_cut_and_their_first_token_is_their_prompt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "a" * (n + 1)} for n in range(9)])
    passages = load_passages(text_spec(path), tiny_tokenizer())
    assert {split: len(found) for split, found in passages.items()} == {"probe": 2, "select": 3, "test": 4}
    for passage in (passage for found in passages.values() for passage in found):
        assert len(passage.prompt_ids) == 1
        assert 1 <= len(passage.answer_ids) <= 4
        assert [*passage.prompt_ids, *passage.answer_ids] == list(tiny_tokenizer()("a" * 9)["input_ids"])[
            : 1 + len(passage.answer_ids)
        ]


def test_a_passage_without_two_tokens_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "a" * n} for n in range(9)])
    empty = len(tiny_tokenizer()("")["input_ids"])
    with pytest.raises(DataError, match=rf"the passage '' has {empty} tokens, expected two or more"):
        load_passages(text_spec(path), tiny_tokenizer())


def test_passages_of_the_package_are_enough_for_the_default_splits() -> None:
    passages = load_passages(TextSpec(), tiny_tokenizer())
    assert {split: len(found) for split, found in passages.items()} == {"probe": 24, "select": 24, "test": 60}
    assert all(len(passage.answer_ids) == 127 for found in passages.values() for passage in found)
