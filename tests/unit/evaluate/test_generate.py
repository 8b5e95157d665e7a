"""Greedy generation: batched or alone, and whatever a model's own settings say, it is the plain argmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, DEEP_FAMILIES, EOS, PAD, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.generate import (
    Completion,
    GenerationSettings,
    end_ids,
    generate,
    left_padded,
    length_batches,
)

PROMPTS = ("1", "12+3=", "a: b?", "what is 4+15=", "0.5 +1 =\n", "q")
LIMIT = 6


@dataclass(frozen=True)
class Setup:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    greedy: list[list[int]]
    """Plain argmax, token by token, with no end."""

    def settings(self, **changes: object) -> GenerationSettings:
        return replace(GenerationSettings(LIMIT, (self.greedy[1][2],)), **changes)  # some rows end early

    def generate(self, **changes: object) -> list[Completion]:
        return generate(self.model, self.tokenizer, self.prompts, self.settings(**changes))


@torch.inference_mode()
def argmax_tokens(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """One token at a time, no padding, no cache."""
    ids = list(prompt)
    for _ in range(LIMIT):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def make_setup(family: str) -> Setup:
    model, tokenizer = tiny_model(family, 1), tiny_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return Setup(model, tokenizer, prompts, [argmax_tokens(model, prompt) for prompt in prompts])


@pytest.fixture(scope="module", params=DEEP_FAMILIES)
def setup(request: pytest.FixtureRequest) -> Setup:
    return make_setup(request.param)


@pytest.fixture(scope="module")
def phi3() -> Setup:
    """Its greedy texts are the most varied."""
    return make_setup("phi3")


def cut(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Up to the first end token, which is kept."""
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batched_is_one_by_one_is_the_argmax(setup: Setup, batch_size: int) -> None:
    ends = setup.settings().end_ids
    tokens = [completion.token_ids for completion in setup.generate(batch_size=batch_size)]
    assert tokens == [cut(row, ends) for row in setup.greedy]
    assert len({len(row) for row in tokens}) > 1


def test_it_is_what_plain_transformers_generates(setup: Setup) -> None:
    completions = setup.generate()
    for prompt, completion in zip(setup.prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        end = list(setup.settings().end_ids)
        out = setup.model.generate(ids, do_sample=False, max_new_tokens=LIMIT, eos_token_id=end, pad_token_id=PAD)
        assert tuple(out[0, len(prompt) :].tolist()) == completion.token_ids


def test_finished_tells_the_end_token_from_the_limit(setup: Setup) -> None:
    ends = setup.settings().end_ids
    completions = setup.generate()
    assert [completion.finished for completion in completions] == [completion.token_ids[-1] in ends for completion in completions]
    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        shown = completion.token_ids[:-1] if completion.finished else completion.token_ids
        assert completion.text == setup.tokenizer.decode(shown, skip_special_tokens=True)


def test_a_completion_may_be_its_end_token_alone(setup: Setup) -> None:
    first = setup.greedy[0][0]
    completion = setup.generate(end_ids=(first,))[0]
    assert completion == Completion((first,), "", finished=True)


def test_without_end_tokens_every_row_takes_every_step(setup: Setup) -> None:
    completions = setup.generate(end_ids=())
    assert [list(completion.token_ids) for completion in completions] == setup.greedy
    assert not any(completion.finished for completion in completions)


OWN = {
    "do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3,
    "min_new_tokens": 6, "bad_words_ids": [[21]], "suppress_tokens": [20], "forced_bos_token_id": 7, "forced_eos_token_id": 9,
    "max_length": 3, "length_penalty": 2.0, "eos_token_id": 11, "stop_strings": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("setting", OWN)
def test_the_models_own_generation_settings_change_nothing_and_stay(
    phi3: Setup, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    expected = phi3.generate()
    own = phi3.model.generation_config
    monkeypatch.setattr(own, setting, OWN[setting], raising=False)
    before = own.to_dict()
    assert phi3.generate() == expected
    assert phi3.model.generation_config is own
    assert own.to_dict() == before


def test_the_models_own_settings_are_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup("llama")
    own = setup.model.generation_config

    def fail(*_args: object, **_settings: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(setup.model), "forward", fail)
    with pytest.raises(ZeroDivisionError):
        setup.generate()
    assert setup.model.generation_config is own


# Stop strings, with a model that says the alphabet: whatever letter a prompt ends with, the next ones follow, and after z the end.

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def alphabet() -> Setup:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.padding_side = "left"
    chain = [*tokenizer.convert_tokens_to_ids(list(ALPHABET)), EOS, PAD]
    following = torch.zeros(len(tokenizer), dtype=torch.long)
    following[chain] = torch.tensor([*chain[1:], chain[0]])

    def say(_model: object, _args: object, kwargs: dict[str, torch.Tensor], output: CausalLMOutputWithPast) -> None:
        output.logits = torch.nn.functional.one_hot(following[kwargs["input_ids"]], len(tokenizer)).float()

    model.register_forward_hook(say, with_kwargs=True)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in ("a", "12+3=d", "w", "m?x")]
    return Setup(model, tokenizer, prompts, [argmax_tokens(model, prompt) for prompt in prompts])


def spelled(setup: Setup, completion: Completion) -> str:
    return setup.tokenizer.decode(completion.token_ids)


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize(
    ("stop", "texts", "tokens"),
    [
        ((), ["bcdefg", "efghij", "xyza", "yzab"], ["bcdefg", "efghij", "xyz</s><pad>a", "yz</s><pad>ab"]),
        (("e",), ["bcd", "", "xyza", "yzab"], ["bcde", "e", "xyz</s><pad>a", "yz</s><pad>ab"]),
        (("fg",), ["bcde", "e", "xyza", "yzab"], ["bcdefg", "efg", "xyz</s><pad>a", "yz</s><pad>ab"]),
        (("gh", "f", "never"), ["bcde", "e", "xyza", "yzab"], ["bcdef", "ef", "xyz</s><pad>a", "yz</s><pad>ab"]),
        (("ab", "de", "=de"), ["bc", "efghij", "xyza", "yz"], ["bcde", "efghij", "xyz</s><pad>a", "yz</s><pad>ab"]),
        (("</s>",), ["bcdefg", "efghij", "xyz", "yz"], ["bcdefg", "efghij", "xyz</s>", "yz</s>"]),
    ],
)
def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(
    alphabet: Setup, stop: tuple[str, ...], texts: list[str], tokens: list[str], batch_size: int
) -> None:
    """It must begin in the completion (`ab`, `=de` begin in prompts), and may be a special token."""
    completions = alphabet.generate(end_ids=(), stop=stop, batch_size=batch_size)
    assert [completion.text for completion in completions] == texts
    assert [spelled(alphabet, completion) for completion in completions] == tokens
    full = [len(completion.token_ids) == LIMIT for completion in completions]
    ended = [any(string in spelled(alphabet, completion) for string in stop) for completion in completions]
    assert [completion.finished for completion in completions] == ended
    assert all(one or other for one, other in zip(full, ended, strict=True))


def test_whichever_comes_first_ends_it_end_token_or_stop_string(alphabet: Setup) -> None:
    completions = alphabet.generate(end_ids=(EOS,), stop=("y", "ab"))
    assert [spelled(alphabet, completion) for completion in completions] == ["bcdefg", "efghij", "xy", "y"]
    completions = alphabet.generate(end_ids=(EOS,), stop=("a",))
    assert [spelled(alphabet, completion) for completion in completions] == ["bcdefg", "efghij", "xyz</s>", "yz</s>"]


def test_what_fills_a_stopped_row_is_no_end_token_of_its_own(alphabet: Setup) -> None:
    """Tokenizers without a pad token pad with their end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    completions = generate(alphabet.model, tokenizer, alphabet.prompts, GenerationSettings(LIMIT, (EOS,), ("e",)))
    assert [spelled(alphabet, completion) for completion in completions] == ["bcde", "e", "xyz</s>", "yz</s>"]


# Numbers that are no numbers.


@pytest.mark.parametrize("module", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_nan_logits_are_refused(module: str) -> None:
    setup = make_setup("llama")
    setup.model.get_submodule(module).weight.data[2, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"generation: NaN logits\. .*float32"):
        setup.generate()


def test_nan_in_later_steps_is_seen_too() -> None:
    setup = make_setup("llama")
    calls = []

    def poison(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape)
        return output * torch.nan if len(calls) == 2 else output  # and finite numbers again after it

    with setup.model.lm_head.register_forward_hook(poison), pytest.raises(NumericsError):
        setup.generate(end_ids=())


# The parts.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_batches_hold_every_prompt_once_shortest_first(lengths: list[int], size: int) -> None:
    batches = list(length_batches(lengths, size))
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


def test_prompts_that_can_reach_past_a_rope_boundary_are_alone() -> None:
    assert list(length_batches([9, 4, 3, 8], 5, limit=2, boundary=6)) == [[2, 1], [3], [0]]


def test_padding_is_on_the_left_and_masked() -> None:
    ids, mask = left_padded([[5], [6, 7, 8]], PAD, torch.device("cpu"))
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, (EOS,)), (EOS, (EOS,)), (0, (0, EOS)), ([9, EOS, 9], (9, EOS)), ([], (EOS,)), ((BOS,), (BOS, EOS))],
)
def test_end_tokens_are_the_models_and_the_tokenizers_each_once(
    listed: int | Sequence[int] | None, expected: tuple[int, ...]
) -> None:
    assert end_ids(listed, tiny_tokenizer()) == expected


def test_a_tokenizer_without_an_end_token_adds_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert end_ids([4], tokenizer) == (4,)
    assert end_ids(None, tokenizer) == ()
