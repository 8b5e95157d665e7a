"""Reading references: one pass over an answer says what decoding and a loss computed token by token would say of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from draw import draw_examples, draw_prompts, left_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, VOCABULARY, tiny_model
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from transplant_ray.evaluate import read as module
from transplant_ray.evaluate.decode import PASS_TOKENS
from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.evaluate.read import Reading, read
from transplant_ray.evaluate.scorers import FORCED
from transplant_ray.evaluate.task import Rendered

LIMIT, NUM_PROMPTS = 8, 20
Spoil = Callable[[random.Random, Sequence[int], int, GenerationSettings], Sequence[int]]


@dataclass(frozen=True)
class Said:
    """What a model says to some prompts, decoded by plain `transformers`."""

    model: PreTrainedModel
    settings: GenerationSettings
    prompts: list[list[int]]
    endless: list[tuple[int, ...]]
    """Greedy tokens, with no end, and more than the limit."""
    lengths: list[int]
    """Tokens up to the end token or the limit."""


@pytest.fixture(scope="module", params=["mistral", "phi3", "gemma2", "gpt2", "opt"])
def said(request: pytest.FixtureRequest) -> Said:
    model, prompts = tiny_model(request.param, 1), draw_prompts(random.Random(6), NUM_PROMPTS)
    endless = [c.token_ids for c in generate(model, left_tokenizer(), prompts, GenerationSettings(LIMIT + 4, ()))]
    ends = (EOS, endless[0][4], endless[1][2], endless[2][5])
    chosen = GenerationSettings(LIMIT, ends)
    lengths = [len(completion.token_ids) for completion in generate(model, left_tokenizer(), prompts, chosen)]
    return Said(model, chosen, prompts, endless, lengths)


def readings(said: Said, references: Sequence[Sequence[int]], rows: int = 50) -> list[Reading]:
    examples = [Rendered(f"e{i}", tuple(p), tuple(r), "") for i, (p, r) in enumerate(zip(said.prompts, references, strict=True))]
    pairs = list(read(said.model, left_tokenizer(), examples, said.settings, lambda _: None, rows))
    assert [index for index, _ in pairs] == list(range(len(examples)))
    return [reading for _, reading in pairs if reading is not None]


def exact(_rng: random.Random, endless: Sequence[int], length: int, _settings: GenerationSettings) -> Sequence[int]:
    return endless[:length]


def another_end(rng: random.Random, endless: Sequence[int], length: int, settings: GenerationSettings) -> Sequence[int]:
    return (*endless[: length - 1], rng.choice(settings.end_ids))


def spoiled(rng: random.Random, endless: Sequence[int], length: int, _settings: GenerationSettings) -> Sequence[int]:
    place = rng.randrange(length)
    return (*endless[:place], rng.randrange(VOCABULARY), *endless[place + 1 : length])


def ended_early(rng: random.Random, endless: Sequence[int], length: int, settings: GenerationSettings) -> Sequence[int]:
    return (*endless[: rng.randrange(length)], rng.choice(settings.end_ids))


def past_the_limit(_rng: random.Random, endless: Sequence[int], length: int, settings: GenerationSettings) -> Sequence[int]:
    """Of those that do not end: what they would say next, and an end."""
    return endless[:length] if endless[length - 1] in settings.end_ids else (*endless[: LIMIT + 2], EOS)


def without_its_end(rng: random.Random, endless: Sequence[int], length: int, _settings: GenerationSettings) -> Sequence[int]:
    return endless[: max(1, length - rng.randint(1, 3))]


def past_its_end(_rng: random.Random, endless: Sequence[int], length: int, _settings: GenerationSettings) -> Sequence[int]:
    return endless[: length + 2]


SPOILS: tuple[Spoil, ...] = (exact, another_end, spoiled, ended_early, past_the_limit)
NO_REFERENCES = (without_its_end, past_its_end)
"""No task renders such: a reference has one end token, at its end."""


def emitted(said: Said, reference: Sequence[int], endless: Sequence[int], length: int) -> bool:
    """Whether decoding says exactly this, one end token being as good as another."""
    greedy, ends = endless[:length], said.settings.end_ids
    same = [one == other or {one, other} <= set(ends) for one, other in zip(greedy, reference, strict=False)]
    return len(greedy) == len(reference) and all(same) and tuple(greedy[:-1]) == tuple(reference[:-1])


def prefix(reference: Sequence[int], endless: Sequence[int]) -> tuple[int, ...]:
    """Up to the first difference, which is part of it."""
    same = next((i for i, token in enumerate(reference) if token != endless[i]), len(reference))
    return tuple(endless[: same + 1]) if same < len(reference) else tuple(reference)


@torch.inference_mode()
def slow_loss(model: PreTrainedModel, prompt: Sequence[int], reference: Sequence[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *reference]]), use_cache=False).logits[0].double()
    logs = log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return -sum(float(logs[place, token]) for place, token in enumerate(reference)) / len(reference)


@pytest.mark.parametrize(
    "spoil",
    [
        *SPOILS,
        without_its_end,
        past_its_end,
    ],
)
def test_a_reference_matches_if_and_only_if_decoding_says_it(said: Said, spoil: Spoil) -> None:
    rng, lengths = random.Random(7), said.lengths
    references = [spoil(rng, endless, length, said.settings) for endless, length in zip(said.endless, lengths, strict=True)]
    expected = [emitted(said, *facts) for facts in zip(references, said.endless, lengths, strict=True)]
    found = readings(said, references)
    clear = [not reading.num_close for reading in found]
    assert sum(clear) > NUM_PROMPTS / 2
    assert [r.matches for r, ok in zip(found, clear, strict=True) if ok] == [e for e, ok in zip(expected, clear, strict=True) if ok]
    assert any(expected) or spoil not in (exact, another_end)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10**6))
def test_losses_and_beginnings_are_those_of_one_example_at_a_time(said: Said, seed: int) -> None:
    rng, lengths = random.Random(seed), said.lengths
    drawn = [rng.choice(SPOILS + NO_REFERENCES) for _ in lengths]
    facts = zip(drawn, said.endless, lengths, strict=True)
    references = [spoil(rng, endless, length, said.settings) for spoil, endless, length in facts]
    found = readings(said, references, rows=rng.choice((1, 5, 50)))
    for reading, prompt, reference, endless in zip(found, said.prompts, references, said.endless, strict=True):
        assert reading.loss == pytest.approx(slow_loss(said.model, prompt, reference), rel=1e-4, abs=1e-5)
        assert reading.num_close or reading.token_ids == prefix(reference, endless)


def test_batches_and_their_limits_change_nothing(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, lengths = random.Random(8), said.lengths
    references = [spoiled(rng, endless, length, said.settings) for endless, length in zip(said.endless, lengths, strict=True)]
    expected = readings(said, references, rows=1)
    for tokens, logits in ((100, module.LOGITS), (2048, 10 * VOCABULARY), (1, module.LOGITS)):
        monkeypatch.setitem(PASS_TOKENS, "cpu", tokens)
        monkeypatch.setattr(module, "LOGITS", logits)
        for rows in (3, 50):
            found = readings(said, references, rows)
            assert [replace(r, loss=0, num_close=0) for r in found] == [replace(r, loss=0, num_close=0) for r in expected]
            assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-4, abs=1e-5)


def test_a_batch_has_no_more_rows_than_asked_and_is_announced(said: Said) -> None:
    announced: list[list[int]] = []
    examples = draw_examples(random.Random(9), 10)

    def look(_model: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        assert len(inputs["input_ids"]) == len(announced[-1])

    with said.model.register_forward_pre_hook(look, with_kwargs=True):
        list(read(said.model, left_tokenizer(), examples, said.settings, lambda rows: announced.append(list(rows)), 4))
    assert announced == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_scorer_counts_what_was_read(said: Said) -> None:
    lengths = said.lengths
    references = [
        (*endless[:length],) if i % 2 else (3, EOS) for i, (endless, length) in enumerate(zip(said.endless, lengths, strict=True))
    ]
    examples = [Rendered(f"e{i}", tuple(p), r, "") for i, (p, r) in enumerate(zip(said.prompts, references, strict=True))]
    outcomes = answer_examples("v", said.model, left_tokenizer(), examples, said.settings, FORCED)
    found = readings(said, references)
    assert [outcome.example for outcome in outcomes] == [example.id for example in examples]
    assert [outcome.correct for outcome in outcomes] == [reading.matches for reading in found]
    assert [outcome.finished for outcome in outcomes] == [reading.matches for reading in found]
    assert [outcome.num_tokens for outcome in outcomes] == [len(reading.token_ids) for reading in found]
    assert [outcome.num_close for outcome in outcomes] == [reading.num_close for reading in found]


@pytest.mark.parametrize("rows", [1, 50])
def test_a_row_with_nan_is_given_up_alone(rows: int) -> None:
    model = tiny_model("llama", 1)
    examples = [Rendered(f"e{i}", (4, 6), (5 + i, EOS), "") for i in range(5)]
    chosen = GenerationSettings(LIMIT, (EOS,))
    clean = list(read(model, left_tokenizer(), examples, chosen, lambda _: None, rows))
    model.get_input_embeddings().weight.data[7] = torch.nan  # only the third reference has it
    found = list(read(model, left_tokenizer(), examples, chosen, lambda _: None, rows))
    assert [reading is None for _, reading in found] == [False, False, True, False, False]
    for (_, mine), (_, other) in zip(found, clean, strict=True):
        assert mine is None or (other is not None and mine.loss == pytest.approx(other.loss, rel=1e-4))
