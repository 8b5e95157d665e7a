"""Choices: the likeliest one is chosen, by log-likelihoods that plain `transformers` gives one text at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import draw_prompts, draw_variant, left_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, EOS, tiny_model, tiny_pair, tiny_tokenizer
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from transplant_ray.errors import DataError
from transplant_ray.evaluate import engine as engine_module
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered, encode_pair, longest_choice
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.outcome import Outcome, answer_examples
from transplant_ray.evaluate.scorers import CHOICES
from transplant_ray.evaluate.task import load_task, tokenize
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.recipe import TaskSpec

SETTINGS = GenerationSettings(5, (EOS,), batch_size=7)
LENGTHS = {
    "choice": lambda _: 1,
    "choice:tokens": lambda c: len(c.answer_ids),
    "choice:characters": lambda c: len(c.answer.strip()),
}


def draw_choosing(rng: random.Random, count: int) -> list[Rendered]:
    """Two to five choices of one to five tokens, after a prompt that they share."""
    examples = []
    for number, prompt in enumerate(draw_prompts(rng, count)):
        texts = draw_prompts(rng, rng.randint(2, 5), 5)
        choices = tuple(
            Rendered(f"e{number}/{i}", tuple(prompt), tuple(text), f" {'x' * rng.randint(1, 9)}{i}") for i, text in enumerate(texts)
        )
        right = rng.choice(choices)
        examples.append(Rendered(f"e{number}", right.prompt_ids, right.answer_ids, right.answer, choices))
    return examples


@torch.inference_mode()
def log_likelihood(model: PreTrainedModel, choice: Rendered) -> float:
    """One row, no padding, token by token."""
    ids = torch.tensor([[*choice.prompt_ids, *choice.answer_ids]])
    logs = log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    first = len(choice.prompt_ids) - 1
    return sum(float(logs[first + place, token]) for place, token in enumerate(choice.answer_ids))


def assert_likeliest(outcomes: Sequence[Outcome], model: PreTrainedModel, examples: Sequence[Rendered], scorer: str) -> None:
    for outcome, example in zip(outcomes, examples, strict=True):
        scores = [log_likelihood(model, choice) / LENGTHS[scorer](choice) for choice in example.choices]
        said = [choice.answer for choice in example.choices].index(outcome.completion)
        assert scores[said] == pytest.approx(max(scores), abs=1e-4)
        second = sorted(scores)[-2]
        assert bool(outcome.num_close) == (max(scores) - second < 1e-3) or max(scores) - second == pytest.approx(1e-3, abs=1e-4)
        assert (outcome.example, outcome.correct) == (example.id, outcome.completion == example.answer)
        assert (outcome.num_tokens, outcome.finished, outcome.parsed) == (len(example.choices[said].answer_ids), True, True)


@pytest.mark.parametrize("scorer", sorted(CHOICES))
@pytest.mark.parametrize("family", ["phi3", "gemma2", "gpt2", "opt"])
def test_a_model_chooses_what_it_finds_likeliest(family: str, scorer: str) -> None:
    model, examples = tiny_model(family, 1), draw_choosing(random.Random(3), 25)
    outcomes = answer_examples("v", model, left_tokenizer(), examples, SETTINGS, scorer)
    assert_likeliest(outcomes, model, examples, scorer)
    assert len({outcome.completion for outcome in outcomes}) > 10
    assert 0 < sum(outcome.correct for outcome in outcomes) < len(outcomes)


def test_the_lengths_decide() -> None:
    model, examples = tiny_model("phi3", 1), draw_choosing(random.Random(4), 40)
    chosen = [answer_examples("v", model, left_tokenizer(), examples, SETTINGS, scorer) for scorer in sorted(CHOICES)]
    assert len({tuple(outcome.completion for outcome in outcomes) for outcomes in chosen}) == 3


@pytest.fixture(scope="module", params=["phi3", "gpt2", "opt"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResidentPair:
    """`opt` takes no rows, so each of its variants is read alone."""
    return load_resident_pair(tiny_pair(tmp_path_factory.mktemp(request.param), request.param), "float32")


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_engine_chooses_for_all_variants_at_once(pair: ResidentPair, rows: int) -> None:
    rng, examples = random.Random(5), draw_choosing(random.Random(6), 9)
    variants = [ORIGIN, Variant.uniform(pair.modules), *(draw_variant(pair, rng, what) for what in ("nested", "random", "alpha"))]
    engine = Engine(pair, left_tokenizer(), replace(SETTINGS, batch_size=rows), "choice")
    shards = {shard.variant: shard for shard in engine.answer(variants, examples)}
    assert shards.keys() == {variant.id for variant in variants}
    for variant in variants:
        assert shards[variant.id].error is None
        with pair.grafted(variant) as model:
            assert_likeliest(shards[variant.id].outcomes, model, examples, "choice")
    assert len({shard.outcomes for shard in shards.values()}) > 3


def test_a_broken_choice_is_its_variants_failure(pair: ResidentPair, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = draw_choosing(random.Random(7), 4)
    bad = Variant.uniform(list(pair.modules)[:3])
    plain = engine_module.choose

    def breaks(variant: str, *rest: Any) -> Outcome:
        if variant == bad.id:
            raise RuntimeError("no such operator")
        return plain(variant, *rest)

    monkeypatch.setattr(engine_module, "choose", breaks)
    shards = {shard.variant: shard for shard in Engine(pair, left_tokenizer(), SETTINGS, "choice").answer([ORIGIN, bad], examples)}
    assert shards[bad.id].error == "RuntimeError: no such operator"
    assert len(shards[ORIGIN.id].outcomes) == 4


def test_the_first_of_equal_choices_is_taken() -> None:
    model = tiny_model("phi3", 1)
    twins = tuple(Rendered(f"e/{i}", (5, 6), (7, 8), text) for i, text in enumerate(("one", "two")))
    (outcome,) = answer_examples("v", model, left_tokenizer(), [Rendered("e", (5, 6), (7, 8), "two", twins)], SETTINGS, "choice")
    assert (outcome.completion, outcome.correct, outcome.num_close) == ("one", False, 1)


@pytest.mark.parametrize("length", [10, 20])
def test_past_a_rope_boundary_a_choice_is_read_and_not_decoded(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    model = tiny_model("phi3", 1, rope_parameters=factors, original_max_position_embeddings=16)
    rng = random.Random(8)
    prompts = [tuple(prompt) for prompt in draw_prompts(rng, 4, 1)]
    prompts = [tuple(rng.randrange(3, 20) for _ in range(length)) for _ in prompts]
    examples = [
        Rendered(f"e{n}", prompt, (4, 5), "a", tuple(Rendered(f"e{n}/{i}", prompt, (4 + i, 9), "ab"[i]) for i in range(2)))
        for n, prompt in enumerate(prompts)
    ]
    monkeypatch.setattr("transplant_ray.evaluate.read.generate", None)
    assert_likeliest(answer_examples("v", model, left_tokenizer(), examples, SETTINGS, "choice"), model, examples, "choice")


def test_a_choice_that_exceeds_the_positions_is_refused(pair: ResidentPair) -> None:
    (example,) = draw_choosing(random.Random(9), 1)
    long = replace(example, choices=(*example.choices, replace(example.choices[0], id="long", answer_ids=(7,) * 128)))
    with pytest.raises(DataError, match="exceed the model's 128 positions"):
        next(Engine(pair, left_tokenizer(), SETTINGS, "choice").answer([ORIGIN], [long]))


# From rows to choices.


ROWS = [
    {"q": f"{n}+1=", "options": [str(n + 1), f"{n}{n}", "no"], "text": str(n + 1), "index": 0, "letter": "A", "a": "yes", "b": "no"}
    for n in range(2, 12)
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec(data: str, **changes: Any) -> TaskSpec:
    given = {"data": data, "prompt": "{q}", "answer": "{text}", "scorer": "choice", "choices": "options"}
    return TaskSpec.model_validate({**given, "split": {"probe": 2, "select": 3, "test": 5}, **changes})


@pytest.mark.parametrize("answer", ["{text}", " {text}\n", "{index}", "{letter}", "a"])
def test_an_answer_is_a_text_an_index_or_a_letter(tmp_path: Path, answer: str) -> None:
    task = load_task(spec(write(tmp_path / "rows.jsonl", ROWS), answer=answer))
    found = {example.prompt: (example.answer, example.choices) for example in (*task.probe, *task.select, *task.test)}
    assert found == {row["q"]: (row["text"], tuple(row["options"])) for row in ROWS}


def test_choices_are_templates_too(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    over_list = load_task(spec(data, choices=" {options}.", answer="{text}."))
    assert {example.choices for example in over_list.probe} < {tuple(f" {option}." for option in row["options"]) for row in ROWS}
    listed = load_task(spec(data, choices=[" {a}", " {b}, {q}"], answer="{a}"))
    assert all(example.choices == (" yes", f" no, {example.prompt}") and example.answer == " yes" for example in listed.test)


def test_an_example_is_known_by_its_choices_too(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    ids = [{e.id for e in load_task(spec(data, choices=choices)).test} for choices in ("options", " {options}", "options")]
    assert ids[0] == ids[2]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": ["0", "1", "2"], "text": "1"}, None),
        ({"options": ["1", "0", "2"], "text": "1"}, r"row 1: the answer '1' is the text of '1' and the index \(from 0\) of '0'"),
        ({"options": ["B", "A"], "text": "B"}, "is the text of 'B' and the letter of 'A'"),
        ({"options": ["x", "y"], "text": "z"}, r"row 1: the answer 'z' is not the text of one of the choices \['x', 'y'\]"),
        ({"options": ["x", "y"], "text": "2"}, "the answer '2' is not the"),
        ({"options": ["x", "y"], "text": "C"}, "the answer 'C' is not the"),
        ({"options": ["x"], "text": "x"}, "row 1, `choices`: found \\['x'\\], expected two choices or more"),
        ({"options": ["x", " x "], "text": "x"}, "no two alike"),
        ({"options": ["x", " "], "text": "x"}, "none empty"),
        ({"options": ["x", None], "text": "x"}, r"column 'options' is empty"),
        ({"options": "xy", "text": "x"}, "names 0 columns with a list, expected one; columns are"),
    ],
)
def test_what_is_ambiguous_or_empty_is_refused(tmp_path: Path, changes: dict[str, Any], words: str | None) -> None:
    rows = [{**row, **changes} for row in ROWS]
    data = write(tmp_path / "rows.jsonl", rows)
    if words is None:
        assert {example.answer for example in load_task(spec(data)).test} == {changes["text"]}
        return
    with pytest.raises(DataError, match=words):
        load_task(spec(data))


def test_one_row_that_says_it_another_way_is_named(tmp_path: Path) -> None:
    rows = [{**row, "text": 1 if number == 4 else row["text"]} for number, row in enumerate(ROWS, start=1)]
    with pytest.raises(DataError, match="row 4: the answer '1' is not the text"):
        load_task(spec(write(tmp_path / "rows.jsonl", rows)))


@pytest.mark.parametrize("template", ["{options} {q", "{nothing}", "{options!r}"])
def test_a_template_of_choices_that_does_not_fit_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="row 1, `choices`"):
        load_task(spec(write(tmp_path / "rows.jsonl", ROWS), choices=template))


def test_prompt_and_choice_are_written_together(tmp_path: Path) -> None:
    task, tokenizer = spec(write(tmp_path / "rows.jsonl", ROWS), prompt="{q} ", choices=" {options}"), tiny_tokenizer()
    examples = load_task(task).test
    for example, rendered in zip(examples, tokenize(examples, task, tokenizer), strict=True):
        assert rendered.prompt_ids == (BOS, *tokenizer(example.prompt.strip(), add_special_tokens=False)["input_ids"])
        assert [tokenizer.decode(choice.answer_ids) for choice in rendered.choices] == [f" {text}" for text in example.choices]
        assert [choice.answer for choice in rendered.choices] == list(example.choices)
        right = rendered.choices[example.choices.index(example.answer)]
        assert (rendered.prompt_ids, rendered.answer_ids, rendered.answer) == (right.prompt_ids, right.answer_ids, right.answer)
    assert longest_choice(tokenize(examples, task, tokenizer)) == max(len(f"  {c}") for e in examples for c in e.choices) - 1


def test_choices_follow_a_chat_template(tmp_path: Path) -> None:
    task, tokenizer = spec(write(tmp_path / "rows.jsonl", ROWS), chat_template=True), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    (rendered,) = tokenize(load_task(task).test[:1], task, tokenizer)
    assert tokenizer.decode(rendered.prompt_ids) == f"user: {load_task(task).test[0].prompt}\na:"


@given(context=st.text("ab \n", min_size=1), continuation=st.text("ab \n", min_size=1))
def test_nothing_is_lost_at_the_seam(context: str, continuation: str) -> None:
    head, rest = encode_pair(lambda text: list(text.encode()), context, continuation)
    assert bytes(head + rest).decode() == context + continuation
    assert bytes(head).decode() == context.rstrip()


def test_a_choice_without_tokens_is_refused(tmp_path: Path) -> None:
    task, tokenizer = spec(write(tmp_path / "rows.jsonl", ROWS)), tiny_tokenizer()
    example = load_task(task).test[0]
    with pytest.raises(DataError, match=f"example {example.id}: the choice '' is empty after tokenization"):
        tokenize([replace(example, choices=(*example.choices, ""))], task, tokenizer)
