"""Rotary embeddings that treat a batch as a whole: rows on either side of their boundary never change each other's numbers.

Every example of a mixed list must get what it gets alone in a model that was just built, for a dynamic RoPE remembers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import left_tokenizer, plain_answers, share_of_close
from tiny import EOS, VOCABULARY, tiny_config, tiny_model, tiny_pair
from transformers import PreTrainedModel

from transplant_ray.evaluate.decode import decode
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.read import read
from transplant_ray.evaluate.scorers import FORCED
from transplant_ray.evaluate.task import Rendered
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.compare import Comparison
from transplant_ray.models.rope import forget_longest, max_positions, rope_boundary

BOUNDARY, LIMIT = 32, 8
LONG_FACTORS = [16.0, 6.0, 1.5, 9.0]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BOUNDARY,
    "short_factor": [1.0] * 4, "long_factor": LONG_FACTORS,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 64.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": BOUNDARY, "max_position_embeddings": 128},
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": BOUNDARY},
}
SETTINGS = GenerationSettings(LIMIT, (EOS, 5))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": DEFAULT}, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, None),
        ("llama", CHANGES["llama"], BOUNDARY),
        ("phi3", CHANGES["phi3"], BOUNDARY),
        ("gpt2", {}, None),
        ("gemma3_text", {}, None),
    ],
)
def test_the_boundary_of_a_model(family: str, changes: dict[str, Any], expected: int | None) -> None:
    assert rope_boundary(tiny_config(family, **changes)) == expected


def test_a_dynamic_rope_stretches_the_positions_of_a_model() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert max_positions(tiny_config("llama", max_position_embeddings=32, rope_parameters=rope)) == 128
    assert max_positions(tiny_config("llama", max_position_embeddings=32)) == 32
    assert max_positions(tiny_config("phi3", **CHANGES["phi3"])) == tiny_config("phi3", **CHANGES["phi3"]).max_position_embeddings


@dataclass
class Config:
    """What `rope_boundary` reads, for shapes that no tiny family has."""

    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 64
    original_max_position_embeddings: int = 16


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, None),
        ({}, None),
        ({"full_attention": DEFAULT, "sliding_attention": DEFAULT}, None),
        ({"full_attention": DYNAMIC, "sliding_attention": DEFAULT}, 64),
        ({"full_attention": DEFAULT, "sliding_attention": LONGROPE}, BOUNDARY),
        ({"full_attention": DYNAMIC, "sliding_attention": LONGROPE}, BOUNDARY),
        ({"rope_type": "longrope"}, 16),
        ({"rope_type": "longrope", "short_factor": [1.0]}, 16),
        ({"rope_type": "dynamic"}, 64),
    ],
)
def test_the_nearest_boundary_of_all_types_of_layer(rope: dict[str, Any] | None, expected: int | None) -> None:
    assert rope_boundary(Config(rope)) == expected  # type: ignore[arg-type]


def test_a_dynamic_rope_forgets_the_longest_row() -> None:
    model = tiny_model("llama", **CHANGES["llama"])
    start = model.model.rotary_emb.inv_freq.clone()
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, BOUNDARY + 9, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, start)
    forget_longest(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, start)


# Rows are kept apart.


@pytest.fixture(scope="module", params=CHANGES)
def comparison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_pair(tmp_path_factory.mktemp(request.param), request.param, **CHANGES[request.param])


@pytest.fixture(scope="module")
def fresh(comparison: Comparison) -> Callable[[], PreTrainedModel]:
    """The target, just built."""
    unused = load_resident_pair(comparison, "float32").model
    return lambda: deepcopy(unused)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


LENGTHS = (3, BOUNDARY - LIMIT, 60, BOUNDARY - LIMIT + 1, 20, BOUNDARY, BOUNDARY - 4, 12, 80)


def alone(fresh: Callable[[], PreTrainedModel], examples: Sequence[Rendered], variant: Variant, scorer: str) -> list[Outcome]:
    return [outcome for example in examples for outcome in plain_answers(variant, fresh(), [example], SETTINGS, scorer)]


def mixed_examples(model: PreTrainedModel, answer: int = 3) -> list[Rendered]:
    """Every third has what the model says for a reference."""
    found = []
    for i, prompt in enumerate(prompts(LENGTHS, seed=1)):
        (said,) = generate(model, left_tokenizer(), [prompt], SETTINGS)
        reference = said.token_ids if i % 3 == 0 else (*prompt[:answer], EOS)
        found.append(Rendered(f"e{i}", tuple(prompt), tuple(reference), said.text))
    return found


def without_close(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [replace(outcome, num_close=0) for outcome in outcomes]


@pytest.mark.parametrize("scorer", ["exact", FORCED])
def test_everyone_in_a_mixed_list_gets_what_it_gets_alone(
    comparison: Comparison, fresh: Callable[[], PreTrainedModel], scorer: str
) -> None:
    examples = mixed_examples(fresh())
    expected = without_close(alone(fresh, examples, ORIGIN, scorer))
    assert {outcome.correct for outcome in expected} == {True} | ({False} if scorer == FORCED else set())
    chosen = replace(SETTINGS, batch_size=6)
    found = plain_answers(ORIGIN, fresh(), examples[::-1], chosen, scorer)
    assert without_close(found[::-1]) == expected
    engine = Engine(load_resident_pair(comparison, "float32"), left_tokenizer(), chosen, scorer)
    for _ in range(2):  # the second time it has seen the longest row
        shards = {shard.variant: shard for shard in engine.answer([ORIGIN, Variant.uniform(comparison.pairs)], examples)}
        assert without_close(shards[ORIGIN.id].outcomes) == expected


def test_a_long_row_before_leaves_no_trace(fresh: Callable[[], PreTrainedModel]) -> None:
    model, found, tokenizer = fresh(), [], left_tokenizer()
    rows = prompts([BOUNDARY + 8] * 6, seed=1)
    for row in rows:
        generate(model, tokenizer, prompts([100]), replace(SETTINGS, max_new_tokens=1))
        found += generate(model, tokenizer, [row], SETTINGS)
    assert found == [generate(fresh(), tokenizer, [row], SETTINGS)[0] for row in rows]


def test_variants_on_both_sides_get_what_they_get_by_pointer(comparison: Comparison) -> None:
    pair = load_resident_pair(comparison, "float32")
    variant = Variant.uniform(list(comparison.pairs)[::2])
    with pair.grafted(variant) as model:
        examples = mixed_examples(model)

    unused = load_resident_pair(comparison, "float32")
    unused.apply(variant)
    expected = alone(lambda: deepcopy(unused.model), examples, variant, "exact")
    engine = Engine(pair, left_tokenizer(), SETTINGS, "exact")
    shards = {shard.variant: shard for shard in engine.answer([ORIGIN, variant], examples)}
    assert without_close(shards[variant.id].outcomes) == without_close(expected)
    assert shards[variant.id].outcomes != shards[ORIGIN.id].outcomes


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_losses_do_not_depend_on_who_was_read_before(family: str, tmp_path: Path) -> None:
    pair = load_resident_pair(tiny_pair(tmp_path, family, **CHANGES[family]), "float32")
    examples = [
        Rendered(f"e{i}", tuple(prompt), (7, 9, EOS), "") for i, prompt in enumerate(prompts((100, 40, BOUNDARY - 2, 33, 6)))
    ]

    def losses(order: Sequence[Rendered]) -> dict[str, float]:
        readings = list(read(pair.model, left_tokenizer(), order, SETTINGS, lambda _: None, 8))
        return {order[index].id: reading.loss for index, reading in readings if reading}

    expected: dict[str, float] = {}
    for example in examples:
        forget_longest(pair.model)
        expected |= losses([example])
    assert losses(examples) == pytest.approx(expected, rel=1e-4)


def test_nan_past_the_boundary_fails_one_variant(comparison: Comparison) -> None:
    """Reading decodes such rows; what the target says there first is poison to whoever says it."""
    pair = load_resident_pair(comparison, "float32")
    other = Variant.uniform(comparison.pairs)

    def says(variant: Variant, prompt: Sequence[int]) -> tuple[int, ...]:
        with pair.grafted(variant) as model:
            return generate(model, left_tokenizer(), [prompt], SETTINGS)[0].token_ids

    drawn = (prompts([BOUNDARY + 8], seed)[0] for seed in range(100))
    prompt = next(p for p in drawn if len(says(ORIGIN, p)) > 1 and says(ORIGIN, p)[0] not in {*p, *says(other, p)})
    poison = says(ORIGIN, prompt)[0]
    pair.model.get_input_embeddings().weight[poison] = torch.nan
    engine = Engine(pair, left_tokenizer(), SETTINGS, FORCED)
    shards = {shard.variant: shard for shard in engine.answer([ORIGIN, other], [Rendered("e", tuple(prompt), (9, EOS), "")])}
    assert shards[other.id].error is None
    assert str(shards[ORIGIN.id].error).startswith("NumericsError")


def test_mixing_them_would_change_what_they_say(fresh: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above can fail."""
    examples = mixed_examples(fresh())
    expected = alone(fresh, examples, ORIGIN, "exact")
    monkeypatch.setattr("transplant_ray.evaluate.generate.rope_boundary", lambda _: None)
    mixed = plain_answers(ORIGIN, fresh(), examples, SETTINGS)
    assert sum(one.completion != other.completion for one, other in zip(mixed, expected, strict=True)) >= 3


def test_a_row_that_has_ended_does_not_lead_its_batch_over_the_boundary() -> None:
    """Rows are decoded together whose prompt and limit just fit; one that ended waits until enough have, and steps on."""
    model, rng, limit = tiny_model("phi3", 2, **CHANGES["phi3"]), random.Random(4), 12
    rows = [[rng.randrange(3, VOCABULARY) for _ in range(BOUNDARY - limit)]]
    rows += [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(6, BOUNDARY - limit))] for _ in range(60)]
    chosen = GenerationSettings(limit, tuple(rng.sample(range(3, VOCABULARY), 4)))
    expected = generate(model, left_tokenizer(), rows, chosen)
    found = dict(decode(model, left_tokenizer(), rows, chosen, lambda _: None, 16))
    assert share_of_close([found[index] for index in range(len(rows))], expected) < 0.2
