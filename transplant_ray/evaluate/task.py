"""A task: rows from a file or the hub, rendered into prompts and answers, split into disjoint probe, select and test sets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from transplant_ray.errors import DataError
from transplant_ray.evaluate.choices import Choosing, check_choices, settle
from transplant_ray.evaluate.example import Example, Rendered, Split, encode_example
from transplant_ray.recipe import HubData, ShotSpec, SplitSpec, TaskSpec, TextSpec
from transplant_ray.rows import Row, render, stream_rows, template_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    probe: tuple[Example, ...]
    select: tuple[Example, ...]
    test: tuple[Example, ...]
    shots: tuple[Example, ...] = ()
    """Examples that stand before every prompt, in their order; they are in no split."""

    def __getitem__(self, split: Split) -> tuple[Example, ...]:
        examples: tuple[Example, ...] = getattr(self, split)
        return examples


def load_task(spec: TaskSpec) -> Task:
    """Read, render and split. DataError for missing files, columns or fields, duplicates, or too few rows."""
    where, examples = _read_examples(spec.data, spec)
    task = split_examples(examples, spec.split, where)
    return task if spec.shots is None else replace(task, shots=_draw_shots(task, examples, spec.shots, spec))


def _read_examples(data: str | HubData, spec: TaskSpec) -> tuple[str, list[Example]]:
    where = data if isinstance(data, str) else data.path
    examples = make_examples(read_data(data), spec, where)
    check_distinct(examples, where)
    return where, examples


def _draw_shots(task: Task, examples: Sequence[Example], shots: ShotSpec, spec: TaskSpec) -> tuple[Example, ...]:
    """From rows that the splits leave over, or from data of their own, which must then hold no example of a split."""
    taken = {(example.asked, example.choices) for split in (task.probe, task.select, task.test) for example in split}
    if shots.data is None:
        where, rest = "`task.shots`", [example for example in examples if (example.asked, example.choices) not in taken]
    else:
        where, rest = _read_examples(shots.data, spec)
    drawn = tuple(draw(rest, spec.split.seed)[: shots.num])
    if len(drawn) < shots.num:
        raise DataError(
            f"{where}: {len(drawn)} rows are in no split, and {shots.num} shots are asked for. Make `task.split` smaller."
        )
    for shot in drawn:
        if (shot.asked, shot.choices) in taken:
            raise DataError(f"{where}: the shot {shot.asked[:60]!r} is an example of a split. Draw shots from other rows.")
    return drawn


def read_data(data: str | HubData) -> list[Row]:
    rows = list(stream_rows(data))
    if not rows:
        raise DataError(f"{data if isinstance(data, str) else data.path}: holds no rows.")
    return rows


def make_examples(rows: Sequence[Row], spec: TaskSpec, where: str) -> list[Example]:
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    if spec.choices is None:
        return [make_example(row, spec, place) for row, place in zip(rows, places, strict=True)]
    return settle([_make_choosing(row, spec.choices, spec, place) for row, place in zip(rows, places, strict=True)])


def _make_choosing(row: Row, choices: str | Sequence[str], spec: TaskSpec, where: str) -> Choosing:
    example = make_example(row, spec, where)
    place = f"{where}, `choices`"
    texts = _over_list(choices, row, place) if isinstance(choices, str) else [render(text, row, place) for text in choices]
    return Choosing(where, example.prompt, example.answer, check_choices(texts, place))


def _over_list(template: str, row: Row, where: str) -> list[str]:
    """The template for every element of the list that it names; a bare name is a column."""
    template = template if "{" in template else f"{{{template}}}"
    fields = [field for _, field in template_fields(template, where) if field is not None]
    lists = [field for field in fields if isinstance(row.get(field), list)]
    if len(lists) != 1:
        found = f"{len(lists)} columns with a list" if fields else "no column"
        raise DataError(f"{where}: {template!r} names {found}, expected one; columns are {', '.join(map(str, row))}.")
    return [render(template, {**row, lists[0]: element}, where) for element in row[lists[0]]]


def make_example(row: Row, spec: TaskSpec, where: str) -> Example:
    prompt, answer = render(spec.prompt, row, f"{where}, `prompt`"), render(spec.answer, row, f"{where}, `answer`")
    if not answer.strip():
        raise DataError(f"{where}: the reference answer is empty. Remove the row or mend the `answer` template.")
    return Example.of(prompt, answer)


def check_distinct(examples: Iterable[Example], where: str) -> None:
    counts = Counter((example.asked, example.choices) for example in examples)
    (prompt, _), count = max(counts.items(), key=lambda item: item[1])
    if count > 1:
        repeated = sum(n - 1 for n in counts.values())
        hint = ' Is it the same in all rows by intent? Of plain text it is empty: `prompt: ""`.' if len(counts) == 1 else ""
        raise DataError(
            f"{where}: {repeated} duplicate examples, e.g. {prompt[:60]!r} is there {count} times. Splits would overlap; "
            f"remove the duplicates.{hint}"
        )


def check_apart(prompts_of: Mapping[str, Sequence[str]]) -> None:
    """DataError where two tasks, given by name and prompts, share one, white space aside: a guard is an ability of its own."""
    owner: dict[str, str] = {}
    for name, written in prompts_of.items():
        prompts = [" ".join(prompt.split()) for prompt in written]
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
    order = draw(examples, spec.seed)
    select_end = spec.probe + spec.select
    return Task(tuple(order[: spec.probe]), tuple(order[spec.probe : select_end]), tuple(order[select_end:needed]))


def draw(examples: Sequence[Example], seed: int) -> list[Example]:
    """In an order that follows from what they hold, and from the seed."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}:{example.id}".encode()).digest())


def tokenize(
    examples: Sequence[Example], spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example] = ()
) -> tuple[Rendered, ...]:
    """Token ids of prompts (after the shots), answers and choices. DataError where a chat template is missing."""
    write = prompt_writer(spec, tokenizer, shots)

    def encode(text: str) -> list[int]:  # a chat template writes the special tokens itself
        return list(tokenizer(text, add_special_tokens=not spec.chat_template)["input_ids"])

    written = [replace(example, prompt=write(example.prompt)) for example in examples]
    return tuple(encode_example(each, encode, tokenizer, plain_text=spec.measures == "loss") for each in written)


def prompt_writer(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example] = ()) -> Callable[[str], str]:
    """What the model is given of a prompt: the shots and the prompt as they are, or as messages of a chat."""
    if not spec.chat_template:
        before = "".join(shot.prompt + shot.answer + (spec.shots.separator if spec.shots else "") for shot in shots)
        return lambda prompt: before + prompt
    if not tokenizer.chat_template:
        raise DataError("`task.chat_template: true`: the target's tokenizer has no chat template. Set it to false.")
    system = [{"role": "system", "content": spec.system}] if spec.system is not None else []

    pairs = [(("user", shot.prompt), ("assistant", shot.answer)) for shot in shots]
    turns = [{"role": role, "content": content} for pair in pairs for role, content in pair]

    def write(prompt: str) -> str:
        messages = [*system, *turns, {"role": "user", "content": prompt}]
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            hint = "Set it to false." if spec.system is None else "If it knows no system message, say `task.system=null`."
            raise DataError(
                f"`task.chat_template: true`: the target's chat template refuses the messages ({error}). {hint}"
            ) from error

    return write
