"""A task: rows from a file or the hub, rendered into prompts and answers, split into disjoint probe, select and test sets."""

from __future__ import annotations

import difflib
import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from transplant_ray import zoo
from transplant_ray.errors import DataError
from transplant_ray.evaluate.example import Example, Rendered, Split, encode_example
from transplant_ray.recipe import HubData, SplitSpec, TaskSpec, TextSpec

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    probe: tuple[Example, ...]
    select: tuple[Example, ...]
    test: tuple[Example, ...]

    def __getitem__(self, split: Split) -> tuple[Example, ...]:
        examples: tuple[Example, ...] = getattr(self, split)
        return examples


def load_task(spec: TaskSpec) -> Task:
    """Read, render and split. DataError for missing files, columns or fields, duplicates, or too few rows."""
    rows = read_data(spec.data)
    where = spec.data if isinstance(spec.data, str) else spec.data.path
    examples = [make_example(row, spec, f"{where}, row {index}") for index, row in enumerate(rows, start=1)]
    check_distinct(examples, where)
    return split_examples(examples, spec.split, where)


def read_data(data: str | HubData) -> list[Row]:
    rows = _read_hub(data) if isinstance(data, HubData) else _read_file(data)
    if not rows:
        raise DataError(f"{data if isinstance(data, str) else data.path}: holds no rows.")
    return rows


def _read_file(data: str) -> list[Row]:
    path = Path(zoo.resolve(data))
    if not path.is_file():
        raise DataError(f"{data}: no such file. Give a .jsonl or .parquet file, or a hub dataset {{path, split}}.")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{data}: {path.suffix or 'no suffix'} is not read; expected one of {', '.join(_READERS)}.")
    return reader(path)


def make_example(row: Row, spec: TaskSpec, where: str) -> Example:
    prompt, answer = render(spec.prompt, row, f"{where}, `prompt`"), render(spec.answer, row, f"{where}, `answer`")
    if not answer.strip():
        raise DataError(f"{where}: the reference answer is empty. Remove the row or mend the `answer` template.")
    return Example.of(prompt, answer)


def render(template: str, row: Row, where: str) -> str:
    """Fill `{column}` fields; `{{` is a brace. DataError for a field that is no column, or empty in this row."""
    try:
        fields = [(text, _plain_field(*parts)) for text, *parts in string.Formatter().parse(template)]
    except ValueError as error:
        raise DataError(f"{where}: the template {template!r} is malformed ({error}). Write {{{{ for a brace.") from error
    return "".join(text + ("" if field is None else _column(row, field, where)) for text, field in fields)


def _plain_field(field: str | None, layout: str | None, conversion: str | None) -> str | None:
    if layout or conversion:
        raise ValueError(f"{field!r} has a format of its own, and columns are filled in as they are")
    return field


def check_distinct(examples: Iterable[Example], where: str) -> None:
    counts = Counter(example.prompt for example in examples)
    prompt, count = max(counts.items(), key=lambda item: item[1])
    if count > 1:
        repeated = sum(n - 1 for n in counts.values())
        raise DataError(
            f"{where}: {repeated} duplicate examples, e.g. {prompt[:60]!r} is there {count} times. Splits would overlap; "
            "remove the duplicates."
        )


def check_apart(tasks: Mapping[str, Task]) -> None:
    """DataError where two tasks share a prompt: a guard is an ability of its own."""
    owner: dict[str, str] = {}
    for name, task in tasks.items():
        prompts = [example.prompt for split in (task.probe, task.select, task.test) for example in split]
        if shared := [prompt for prompt in prompts if prompt in owner]:
            raise DataError(
                f"`guards.tasks.{name}`: {len(shared)} of its {len(prompts)} prompts are prompts of `{owner[shared[0]]}`, e.g. "
                f"{shared[0][:60]!r}. A guard is a task of its own; give it other data."
            )
        owner |= dict.fromkeys(prompts, name)


def load_passages(spec: TextSpec, tokenizer: PreTrainedTokenizerBase) -> dict[Split, tuple[Rendered, ...]]:
    """General text, cut to `spec.tokens`: the first token of a passage is its prompt, and the others are predicted.

    DataError where a passage has fewer than two tokens, and as `load_task`.
    """
    where = spec.data if isinstance(spec.data, str) else spec.data.path
    rows = enumerate(read_data(spec.data), start=1)
    passages = [Example.of(render(spec.text, row, f"{where}, row {number}, `guards.text.text`"), "") for number, row in rows]
    check_distinct(passages, where)
    task = split_examples(passages, spec.split, where)
    splits: tuple[Split, ...] = ("probe", "select", "test")
    return {split: tuple(_passage(example, spec.tokens, tokenizer, where) for example in task[split]) for split in splits}


def _passage(example: Example, num_tokens: int, tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    ids = tuple(tokenizer(example.prompt, truncation=True, max_length=num_tokens)["input_ids"])
    if len(ids) < 2:
        raise DataError(f"{where}: the passage {example.prompt[:60]!r} has {len(ids)} tokens, expected two or more. Remove it.")
    return Rendered(example.id, ids[:1], ids[1:], "")


def split_examples(examples: Sequence[Example], spec: SplitSpec, where: str) -> Task:
    """Disjoint splits by content hash and seed: they do not depend on the order of the file."""
    needed = spec.probe + spec.select + spec.test
    if len(examples) < needed:
        raise DataError(
            f"{where}: {len(examples)} examples, the splits need {needed} ({spec.probe} probe + {spec.select} select + "
            f"{spec.test} test). Make `task.split` smaller or add rows."
        )
    order = sorted(examples, key=lambda e: hashlib.sha256(f"{spec.seed}:{e.id}".encode()).digest())
    select_end = spec.probe + spec.select
    return Task(tuple(order[: spec.probe]), tuple(order[spec.probe : select_end]), tuple(order[select_end:needed]))


def tokenize(examples: Sequence[Example], spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[Rendered, ...]:
    """Token ids of prompts and answers. DataError where a chat template is asked for and there is none."""
    encode = prompt_encoder(spec, tokenizer)
    return tuple(encode_example(example, encode, tokenizer) for example in examples)


def prompt_encoder(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """How a prompt becomes token ids: plain with the tokenizer's special tokens, or as a chat message."""
    if not spec.chat_template:
        return lambda prompt: list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise DataError("`task.chat_template: true`: the target's tokenizer has no chat template. Set it to false.")
    system = [{"role": "system", "content": spec.system}] if spec.system is not None else []

    def encode(prompt: str) -> list[int]:
        messages = [*system, {"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # e.g. a template that knows no system message
            raise DataError(f"`task.chat_template: true`: the target's chat template refuses the messages ({error}).") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


def _column(row: Row, field: str, where: str) -> str:
    if field not in row:
        near = difflib.get_close_matches(field, [str(key) for key in row], n=1)
        hint = f" Did you mean {{{near[0]}}}?" if near else ""
        raise DataError(f"{where}: no column {field!r}; columns are {', '.join(map(str, row))}.{hint}")
    if row[field] is None:
        raise DataError(f"{where}: column {field!r} is empty. Fill it or remove the row.")
    return str(row[field])


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028, which JSON strings may hold
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}). Expected one object a line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: found {type(row).__name__}, expected one JSON object a line.")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    return rows


def _read_hub(data: HubData) -> list[Row]:
    from datasets import load_dataset  # two seconds of import that only hub data needs
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(data.path, data.name, split=data.split, revision=data.revision))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{data.path}: the hub dataset cannot be loaded ({error}). Check path, name, split and network.") from error


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
