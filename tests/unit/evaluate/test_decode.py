"""Decoding with rows that come and go: every row says what plain `generate` says of it, whoever its neighbours are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from draw import draw_prompts, left_tokenizer, share_of_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, CONFIGS, EOS, VOCABULARY, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from transplant_ray.evaluate import decode as module
from transplant_ray.evaluate.decode import Decoded, can_decode, decode
from transplant_ray.evaluate.generate import Completion, GenerationSettings, generate

SETTINGS = GenerationSettings(9, (EOS, 5, 9, 17))


@dataclass
class Log:
    """What `decode` assigned, and the forward passes that followed."""

    assigned: list[list[int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Rows of every decode step."""

    def __call__(self, indices: Sequence[int]) -> None:
        self.assigned.append(list(indices))

    def count(self, _model: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        assert len(inputs["input_ids"]) == len(self.assigned[-1])
        if inputs["input_ids"].shape[1] == 1:
            self.steps.append(len(inputs["input_ids"]))


def decoded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings, rows: int, log: Log | None = None
) -> list[Completion | None]:
    """In the order of `prompts`."""
    pairs: list[Decoded] = list(decode(model, left_tokenizer(), prompts, settings, log or Log(), rows))
    assert sorted(index for index, _ in pairs) == list(range(len(prompts)))
    return [completion for _, completion in sorted(pairs, key=lambda pair: pair[0])]


def plain(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Completion]:
    return generate(model, left_tokenizer(), prompts, settings)


# It is what `generate` says.


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, 1)


@pytest.fixture(scope="module")
def phi3() -> PreTrainedModel:
    return tiny_model("phi3", 1)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_every_family_decodes_what_it_generates(model: PreTrainedModel, rows: int) -> None:
    """Prompts on both sides of the sliding windows of 16."""
    prompts = draw_prompts(random.Random(0), 12, longest=30)
    endless = plain(model, prompts, replace(SETTINGS, end_ids=()))
    some_end = replace(SETTINGS, end_ids=(EOS, endless[2].token_ids[3], endless[5].token_ids[0], endless[7].token_ids[6]))
    expected = plain(model, prompts, some_end)
    assert share_of_close(decoded(model, prompts, some_end, rows), expected) < 0.3
    assert len({len(completion.token_ids) for completion in expected}) > 2


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_drawn_prompts_ends_and_sizes_too(phi3: PreTrainedModel, seed: int) -> None:
    """`share_of_close` asserts that both say the same up to the first close step; how many are close is not the point here."""
    rng = random.Random(seed)
    prompts = draw_prompts(rng, rng.randint(1, 12), longest=rng.choice((1, 40)))
    ends = tuple(rng.sample(range(3, VOCABULARY), rng.choice((0, 1, 8))))
    stop = tuple(rng.sample("abcdefghij0123456789", rng.choice((0, 0, 2))))
    drawn = GenerationSettings(rng.choice((1, 2, 9)), ends, stop)
    share_of_close(decoded(phi3, prompts, drawn, rng.randint(1, 12)), plain(phi3, prompts, drawn))


def test_no_prompts_are_no_work(phi3: PreTrainedModel) -> None:
    log = Log()
    assert decoded(phi3, [], SETTINGS, 4, log) == []
    assert log.assigned == []


def test_prompts_longer_than_one_prefill_are_read_one_by_one(phi3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = draw_prompts(random.Random(1), 9, longest=25)
    expected = plain(phi3, prompts, SETTINGS)
    for most, parts in ((1, [1] * 9), (10**6, [9])):
        log = Log()
        monkeypatch.setitem(module.PASS_TOKENS, "cpu", most)
        share_of_close(decoded(phi3, prompts, SETTINGS, 9, log), expected)
        assert [len(indices) for indices in log.assigned[: len(parts)]] == parts


# A model that counts down says when rows end: a prompt's last token n is followed by n − 1, n − 2, …, EOS.


def countdown(family: str) -> PreTrainedModel:
    model = tiny_model(family)

    def say(_model: object, _args: object, inputs: dict[str, torch.Tensor], output: CausalLMOutputWithPast) -> None:
        following = (inputs["input_ids"] - 1).clamp(min=0)
        output.logits = output.logits * 0 + torch.nn.functional.one_hot(following, VOCABULARY)

    model.register_forward_hook(say, with_kwargs=True)
    return model


@pytest.fixture(scope="module")
def counting() -> PreTrainedModel:
    return countdown("llama")


def says(length: int) -> int:
    """The token after which `length` tokens follow; at most 43."""
    return EOS + length


ROWS, LIMIT = 16, 40


def test_rows_leave_when_they_end_and_others_take_their_room(counting: PreTrainedModel) -> None:
    """Every eighth row is long; a static batch would drag all to its longest."""
    lengths = [LIMIT if i % 8 == 0 else 2 + i % 3 for i in range(96)]
    prompts = [[*[BOS] * (i % 5), says(length)] for i, length in enumerate(lengths)]
    log, ends = Log(), GenerationSettings(LIMIT, (EOS,))
    with counting.register_forward_pre_hook(log.count, with_kwargs=True):
        completions = decoded(counting, prompts, ends, ROWS, log)
    assert [completion and len(completion.token_ids) for completion in completions] == lengths
    assert all(completion and completion.finished for completion in completions)
    for indices in log.assigned:
        assert indices == sorted(set(indices))
        assert len(indices) <= ROWS
    static = len(lengths) * LIMIT
    assert sum(lengths) <= sum(log.steps) + len(lengths) < 0.45 * static
    assert log.steps[0] == ROWS


def test_completions_are_given_out_as_they_end(counting: PreTrainedModel) -> None:
    lengths = [30, 2, 20, 4, 12]
    pairs = decode(counting, left_tokenizer(), [[says(n)] for n in lengths], GenerationSettings(LIMIT, (EOS,)), Log(), ROWS)
    assert [index for index, _ in pairs] == [1, 3, 4, 2, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_row_is_led_past_its_limit_while_it_waits_to_be_dropped(family: str) -> None:
    """A row of 118 and 10 tokens ends alone, while rows that came later go on: 128 positions are all there are."""
    model, limit, furthest = countdown(family), 10, []

    def look(_model: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        furthest.append(int(inputs["position_ids"].max()))

    prompts = [[BOS] * 117 + [says(40)], *([says(5)] for _ in range(ROWS - 1)), *([says(40)] for _ in range(ROWS))]
    with model.register_forward_pre_hook(look, with_kwargs=True):
        completions = decoded(model, prompts, GenerationSettings(limit, (EOS,)), ROWS)
    assert [len(completion.token_ids) for completion in completions if completion] == [limit] + [5] * (ROWS - 1) + [limit] * ROWS
    assert max(furthest) < 128


# What ends a row.


def test_the_limit_cuts_a_row_and_it_is_not_finished(counting: PreTrainedModel) -> None:
    completions = decoded(counting, [[says(3)], [says(4)], [says(5)]], GenerationSettings(4, (EOS,)), 2)
    found = [(completion.token_ids, completion.finished) for completion in completions if completion]
    assert found == [((4, 3, EOS), True), ((5, 4, 3, EOS), True), ((6, 5, 4, 3), False)]


def spelled(model: PreTrainedModel, text: str, stop: str, **changes: object) -> Completion:
    """What follows `text`: the characters before it in the vocabulary, backwards, then `</s>`, `<s>` and `<pad>` for good."""
    tokenizer = left_tokenizer()
    prompt = tokenizer(text)["input_ids"]
    ends = replace(GenerationSettings(60, (), (stop,)), **changes)
    (expected,) = plain(model, [prompt], ends)
    assert decoded(model, [prompt, [says(9)], prompt], ends, 2)[::2] == [expected, expected]
    return expected


BACKWARDS = ".?:=+ 9876543210zyxwvutsrqponmlkjihgfedcba"


@pytest.mark.parametrize(
    ("stop", "before", "num_tokens"),
    [
        ("fed", ".?:=+ 9876543210zyxwvutsrqponmlkjihg", 39),
        ("=+", ".?:", 5),
        ("=+ 9876543210zyxwvutsrqponmlkjihgfedcba", ".?:", 42),  # longer than the window
        ("a</s>", BACKWARDS, 43),
        ("<s>", BACKWARDS, 44),
        ("A", BACKWARDS, 60),
    ],
)
def test_a_stop_string_ends_a_row_however_long_or_special(
    counting: PreTrainedModel, stop: str, before: str, num_tokens: int
) -> None:
    completion = spelled(counting, "\n", stop)
    assert (completion.text, len(completion.token_ids), completion.finished) == (before, num_tokens, stop != "A")


def test_what_is_said_after_a_stop_string_is_no_part_of_it(counting: PreTrainedModel) -> None:
    assert spelled(counting, "f", "d", end_ids=(EOS,)).token_ids == tuple(left_tokenizer().convert_tokens_to_ids(list("ed")))


@dataclass(frozen=True)
class HalfCharacters:
    """A tokenizer for which a text that does not begin with `first` begins within a character."""

    first: int
    plain: PreTrainedTokenizerBase = field(default_factory=left_tokenizer)
    pad_token_id: int = 0

    def decode(self, tokens: Sequence[int], **settings: bool) -> str:
        text: str = self.plain.decode(tokens, **settings)
        return text if tokens[0] == self.first else f"\ufffd{text}"


def test_a_stop_string_that_only_a_part_of_the_text_holds_ends_nothing(counting: PreTrainedModel) -> None:
    ends = GenerationSettings(LIMIT, (EOS,), ("\ufffd",))
    ((_, completion),) = decode(counting, HalfCharacters(says(LIMIT)), [[says(LIMIT + 1)]], ends, Log(), 1)
    assert completion is not None
    assert (len(completion.token_ids), completion.finished) == (LIMIT, False)


# Numbers that are no numbers.


def poisoned(model: PreTrainedModel, token: int) -> None:
    model.get_input_embeddings().weight.data[token] = torch.nan


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows", [2, 100])
def test_a_row_with_nan_is_given_up_alone(family: str, rows: int) -> None:
    """Token 40 is poison, in the prompt of one row, and in what another row says."""
    model = tiny_model(family, 1, tie_word_embeddings=False)
    prompts = [[token % 30 + 3 for token in prompt] for prompt in draw_prompts(random.Random(2), 10)]
    clean = decoded(model, prompts, SETTINGS, rows)
    said = next(completion.token_ids[1] for completion in clean if completion and len(completion.token_ids) > 3)
    bad = {i for i, c in enumerate(clean) if c and (said in prompts[i] or said in c.token_ids[:-1])}
    assert 0 < len(bad) < len(prompts)
    poisoned(model, said)
    found = decoded(model, prompts, SETTINGS, rows)
    assert {i for i, completion in enumerate(found) if completion is None} == bad
    share_of_close([c for c in found if c], [replace(c, num_close=0) for i, c in enumerate(clean) if c and i not in bad])


# Which models it takes.


def test_it_takes_the_usual_families(model: PreTrainedModel) -> None:
    assert can_decode(model)


class WithoutPositions:
    """What `can_decode` looks at, of a model that counts positions itself."""

    def forward(self, input_ids: object, past_key_values: object, attention_mask: object) -> None: ...


def test_it_does_not_take_a_recurrent_state_or_a_model_that_counts_positions_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert can_decode(model)
    monkeypatch.setattr(model, "_is_stateful", True, raising=False)
    assert not can_decode(model)
    assert not can_decode(WithoutPositions())  # type: ignore[arg-type]
