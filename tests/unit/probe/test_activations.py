"""Activation statistics, and `lae` against a slow and obvious reference: float64, one example, one token at a time, no cache.

The reference is written from method.md: a(t) is the mean |h| of a module's output at the last token of decode step t; step 1 is the
last token of the prompt; the score is the mean of |a_source − a_target| over the (example, step) that both models took.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny import DEEP_FAMILIES, EOS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.probe import statistics
from transplant_ray.probe.rankers import Evidence, rank
from transplant_ray.probe.statistics import ActivationStats, Continuations, greedy_continuations, mean_magnitudes, stream_stats

TASK = {"1": "15", "12+3=": "7", "a: b?": "yes", "q": "42 or so"}
LIMIT = 5
Steps = dict[tuple[str, int], dict[str, float]]
"""(example, step) → module → mean |h|."""


@dataclass(frozen=True)
class Models:
    source: PreTrainedModel
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modules: tuple[str, ...]
    settings: GenerationSettings
    """With an end token that some texts meet before the limit, and batches of mixed lengths."""


def make_models(family: str) -> Models:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    source, target = tiny_model(family, 1), tiny_model(family, 2)
    linears = (name for name, module in source.named_modules() if type(module).__name__ in ("Linear", "Conv1D"))
    texts = generate(source, tokenizer, [tokenizer(prompt)["input_ids"] for prompt in TASK], GenerationSettings(LIMIT, ()))
    settings = GenerationSettings(LIMIT, (texts[1].token_ids[2],), batch_size=3)
    return Models(source, target, tokenizer, tuple(name for name in linears if name != "lm_head"), settings)


@pytest.fixture(scope="module", params=DEEP_FAMILIES)
def models(request: pytest.FixtureRequest) -> Models:
    return make_models(request.param)


@pytest.fixture(scope="module")
def llama() -> Models:
    return make_models("llama")


@pytest.fixture(scope="module")
def examples() -> tuple[Rendered, ...]:
    tokenizer = tiny_tokenizer()
    return tuple(
        Rendered(f"of {p!r}", tuple(tokenizer(p)["input_ids"]), (*tokenizer(a, add_special_tokens=False)["input_ids"], EOS), a)
        for p, a in TASK.items()
    )


def measure(
    models: Models,
    model: PreTrainedModel,
    examples: Sequence[Rendered],
    texts: Continuations | None = None,
    settings: GenerationSettings | None = None,
) -> ActivationStats:
    settings = settings or models.settings
    return ActivationStats.merge(list(stream_stats(model, models.tokenizer, examples, models.modules, settings, texts)))


def as_steps(stats: ActivationStats) -> Steps:
    rows = zip(stats.keys, stats.values.tolist(), strict=True)
    return {key: dict(zip(stats.modules, row, strict=True)) for key, row in rows}


def check_close(one: Steps, other: Steps) -> None:
    assert one.keys() == other.keys()
    for key, row in one.items():
        assert row == pytest.approx(other[key], rel=1e-5)


# The reference.


@torch.inference_mode()
def slow_step(model: PreTrainedModel, ids: Sequence[int], modules: Sequence[str]) -> tuple[dict[str, float], int]:
    """Mean |h| of every module at the last token, and the next token."""
    seen: dict[str, float] = {}
    with ExitStack() as hooks:
        for name in modules:

            def look(_module: object, _inputs: object, output: torch.Tensor, name: str = name) -> None:
                seen[name] = float(output[0, -1].double().abs().mean())

            hooks.enter_context(model.get_submodule(name).register_forward_hook(look))
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return seen, int(logits[0, -1].argmax())


def slow_steps(
    models: Models, model: PreTrainedModel, examples: Sequence[Rendered], texts: Mapping[str, Sequence[int]] | None
) -> tuple[Steps, dict[str, list[int]]]:
    """All steps of a model along the texts, or along its own, and the texts."""
    model = copy.deepcopy(model).double()
    steps: Steps = {}
    taken: dict[str, list[int]] = {example.id: [] for example in examples}
    for example in examples:
        for step in range(1, LIMIT + 1):
            seen, greedy = slow_step(model, [*example.prompt_ids, *taken[example.id]], models.modules)
            steps[example.id, step] = seen
            taken[example.id].append(greedy if texts is None else texts[example.id][step - 1])
            over = taken[example.id][-1] in models.settings.end_ids if texts is None else step == len(texts[example.id])
            if over:
                break
    return steps, taken


def slow_lae(source: Steps, target: Steps, modules: Sequence[str]) -> dict[str, float]:
    shared = [key for key in source if key in target]
    return {name: sum(abs(source[key][name] - target[key][name]) for key in shared) / len(shared) for name in modules}


# What must hold.


def modules_of(names: Sequence[str]) -> list[Module]:
    return [Module(name, index, name, Role("ffn", "up"), (4, 4), False, "F32", name, None) for index, name in enumerate(names)]


@pytest.fixture(scope="module")
def slow_own(models: Models, examples: tuple[Rendered, ...]) -> tuple[Steps, dict[str, list[int]]]:
    """Steps and texts of the source along its own continuations."""
    return slow_steps(models, models.source, examples, None)


@pytest.mark.parametrize("trajectory", ["own", "source", "reference"])
def test_lae_is_the_slow_reference(
    models: Models, examples: tuple[Rendered, ...], slow_own: tuple[Steps, dict[str, list[int]]], trajectory: str
) -> None:
    source_texts = greedy_continuations(models.source, models.tokenizer, examples, models.settings)
    texts = {"own": None, "source": source_texts, "reference": {e.id: e.answer_ids for e in examples}}[trajectory]
    stats = [measure(models, model, examples, texts) for model in (models.source, models.target)]
    ranking = rank("lae", Evidence(modules_of(models.modules), 0, *stats))

    slow_source = slow_steps(models, models.source, examples, texts)[0] if trajectory == "reference" else slow_own[0]
    slow_target, _ = slow_steps(models, models.target, examples, slow_own[1] if trajectory == "source" else texts)
    expected = slow_lae(slow_source, slow_target, models.modules)
    assert dict(ranking.scores) == pytest.approx(expected, rel=1e-5)
    assert list(ranking.scores) == sorted(expected, key=lambda name: -expected[name])
    assert 0 < len(slow_source.keys() & slow_target.keys()) < LIMIT * len(examples)  # some text ended before the limit


def test_a_model_does_not_differ_from_itself(models: Models, examples: tuple[Rendered, ...]) -> None:
    stats = measure(models, models.source, examples)
    ranking = rank("lae", Evidence(modules_of(models.modules), 0, stats, measure(models, models.source, examples)))
    assert set(ranking.scores.values()) == {0.0}
    assert list(ranking.scores) == list(models.modules)  # all tie: by layer


def test_padding_never_counts(models: Models, examples: tuple[Rendered, ...]) -> None:
    alone: Steps = {}
    for example in examples:
        alone |= as_steps(measure(models, models.source, [example]))
    together = replace(models.settings, batch_size=len(examples))
    check_close(as_steps(measure(models, models.source, examples, None, together)), alone)


def test_a_text_counts_up_to_its_end_token_and_no_further(models: Models, examples: tuple[Rendered, ...]) -> None:
    texts = greedy_continuations(models.source, models.tokenizer, examples, models.settings)
    ended = [text for text in texts.values() if text[-1] in models.settings.end_ids]
    assert ended
    assert any(len(text) < LIMIT for text in ended)
    expected = {(example, step) for example, text in texts.items() for step in range(1, len(text) + 1)}
    assert set(measure(models, models.source, examples).keys) == expected


def test_a_reference_is_measured_up_to_its_end_token_or_the_limit(llama: Models, examples: tuple[Rendered, ...]) -> None:
    texts = {example.id: example.answer_ids for example in examples}
    stats = measure(llama, llama.target, examples, texts)
    steps = [max(step for example, step in stats.keys if example == e.id) for e in examples]
    assert steps == [min(len(answer) + 1, LIMIT) for answer in TASK.values()] == [3, 2, 4, 5]


def test_steps_after_a_stop_string_do_not_count(models: Models, examples: tuple[Rendered, ...]) -> None:
    """Rows of a batch that stop early are filled up by generation; what fills them is no step of theirs."""
    free = GenerationSettings(LIMIT, ())
    text = models.tokenizer.decode(greedy_continuations(models.source, models.tokenizer, examples, free)[examples[1].id])
    stopping = replace(free, stop=(text[1],))
    batched = greedy_continuations(models.source, models.tokenizer, examples, stopping)
    assert len({len(text) for text in batched.values()}) > 1
    for example in examples:
        assert greedy_continuations(models.source, models.tokenizer, [example], stopping) == {example.id: batched[example.id]}
    expected = {(example, step) for example, text in batched.items() for step in range(1, len(text) + 1)}
    assert set(measure(models, models.source, examples, None, stopping).keys) == expected


def test_a_stream_that_is_started_again_gives_the_same_items(llama: Models, examples: tuple[Rendered, ...]) -> None:
    first, again = (list(stream_stats(llama.source, llama.tokenizer, examples, llama.modules, llama.settings)) for _ in range(2))
    assert [part.keys for part in first] == [part.keys for part in again]
    assert all(np.array_equal(one.values, other.values) for one, other in zip(first, again, strict=True))
    assert len(first) == 2  # four examples in batches of three


def test_statistics_of_half_precision_are_float32(examples: tuple[Rendered, ...]) -> None:
    llama = make_models("llama")
    stats = measure(llama, llama.source.bfloat16(), examples)
    assert stats.values.dtype == np.float32
    check = measure(
        llama, tiny_model("llama", 1), examples, greedy_continuations(llama.source, llama.tokenizer, examples, llama.settings)
    )
    np.testing.assert_allclose(stats.values, check.values, rtol=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused_with_the_module(examples: tuple[Rendered, ...], value: float) -> None:
    llama = make_models("llama")
    name = "model.layers.1.mlp.up_proj"
    llama.source.get_submodule(name).weight.data[3, 4] = value
    texts = {example.id: example.answer_ids for example in examples}
    with pytest.raises(NumericsError, match=rf"probe: the activations of {name} are not finite .*float32"):
        measure(llama, llama.source, examples, texts)
    assert num_hooks(llama.source) == 0


def num_hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_the_block(llama: Models, monkeypatch: pytest.MonkeyPatch, examples: tuple[Rendered, ...]) -> None:
    assert measure(llama, llama.source, examples).keys
    assert num_hooks(llama.source) == 0
    with mean_magnitudes(llama.source, llama.modules, torch.tensor([0])):
        assert num_hooks(llama.source) == len(llama.modules)

    def fail(*_args: object, **_settings: object) -> None:
        assert num_hooks(llama.source) == len(llama.modules)
        raise ZeroDivisionError

    monkeypatch.setattr(type(llama.source.base_model), "forward", fail)
    with pytest.raises(ZeroDivisionError):
        statistics.replay(llama.source, examples, [example.answer_ids for example in examples], llama.modules)
    assert num_hooks(llama.source) == 0


def test_hooks_do_not_change_what_the_model_computes(llama: Models) -> None:
    ids = torch.tensor([[1, 7, 9, 30]])
    with torch.inference_mode():
        bare = llama.source(input_ids=ids).logits
        with mean_magnitudes(llama.source, llama.modules, torch.tensor([3, 1])) as magnitudes_MN:
            assert torch.equal(llama.source(input_ids=ids).logits, bare)
    assert magnitudes_MN.shape == (len(llama.modules), 2)
