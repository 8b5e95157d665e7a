"""The promise, packed: what many variants say in one batch is what each says alone, resident by pointer or exported.

Greedy tokens of 0/1 variants are equal in float32, for every example without a step at which two logits were close.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from draw import (
    BLENDED,
    HARD,
    draw_examples,
    draw_pack,
    draw_prompts,
    draw_variant,
    last_logits,
    left_tokenizer,
    plain_answers,
    share_of_close,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, tiny_pair
from transformers import AutoModelForCausalLM

from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft import routed
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.routed import Router, takes_rows
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.compare import Comparison

SETTINGS = GenerationSettings(6, (EOS, 5, 9))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def pair(comparison: Comparison, request: pytest.FixtureRequest) -> ResidentPair:
    pair = load_resident_pair(comparison, "float32")
    if request.param == "sdpa" and not pair.model._supports_sdpa:
        pytest.skip("transformers has no sdpa for this family")
    pair.model.set_attn_implementation(request.param)
    return pair


def packed_answers(
    pair: ResidentPair, pack: Sequence[Variant], examples: Sequence[Rendered], rows: int
) -> dict[str, list[Outcome]]:
    engine = Engine(pair, left_tokenizer(), replace(SETTINGS, batch_size=rows), "exact")
    shards = list(engine.answer(pack, examples))
    assert [shard.error for shard in shards] == [None] * len(pack)
    return {shard.variant: list(shard.outcomes) for shard in shards}


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
def test_a_row_of_a_batch_is_what_its_variant_says_of_it_alone(pair: ResidentPair, seed: int) -> None:
    rng = random.Random(seed)
    pack = draw_pack(pair, rng, HARD + BLENDED)
    rows = [rng.randrange(len(pack)) for _ in range(rng.randint(1, 9))]
    rows = sorted(rows) if rng.random() < 0.7 else rows  # neighbours are the habit, not a duty
    prompts = draw_prompts(rng, len(rows))
    with Router(pair, pack) as router:
        router.assign(rows)
        together = last_logits(pair.model, prompts)
    for row, (variant, prompt) in enumerate(zip(rows, prompts, strict=True)):
        with pair.grafted(pack[variant]) as resident:
            torch.testing.assert_close(together[row], last_logits(resident, [prompt])[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 10**6))
def test_hard_variants_say_in_a_pack_what_they_say_by_pointer(pair: ResidentPair, seed: int) -> None:
    rng = random.Random(seed)
    pack, examples = draw_pack(pair, rng, HARD), draw_examples(rng, 6)
    found = packed_answers(pair, pack, examples, rng.choice((1, 5, 64)))
    for variant in pack:
        with pair.grafted(variant) as resident:
            assert share_of_close(found[variant.id], plain_answers(variant, resident, examples, SETTINGS)) < 0.5


def test_hard_variants_say_in_a_pack_what_their_checkpoints_say(comparison: Comparison, pair: ResidentPair, tmp_path: Path) -> None:
    rng = random.Random(1)
    pack = [draw_variant(pair, rng, what) for what in ("random", "nested", "rows", "rows")]
    examples = draw_examples(rng, 12)
    found = packed_answers(pair, [*pack, ORIGIN, Variant.uniform(pair.modules)], examples, 16)
    for variant in pack:
        folder = export_checkpoint(comparison, variant, tmp_path / variant.id, "card")
        exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=pair.model.config._attn_implementation).eval()
        assert share_of_close(found[variant.id], plain_answers(variant, exported, examples, SETTINGS)) < 0.2
    assert len({tuple(outcome.completion for outcome in outcomes) for outcomes in found.values()}) == len(found)


def test_in_bfloat16_packed_and_exported_differ_in_few_answers(
    bfloat16_pair: Comparison, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Greedy tokens may flip where two logits round to neighbours: counted here, not forbidden."""
    pair, rng = load_resident_pair(bfloat16_pair, "bfloat16"), random.Random(2)
    variant, examples = draw_variant(pair, rng, "random"), draw_examples(rng, 24)
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(bfloat16_pair, variant, tmp_path / "out", "card")).eval()
    prompts = [example.prompt_ids for example in examples]
    with Router(pair, [variant, ORIGIN]) as router:
        router.assign([0] * len(prompts) + [1])
        together = last_logits(pair.model, [*prompts, (4, 5)])[:-1]
    expected = last_logits(exported, prompts)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(together, expected, rtol=5e-2, atol=2e-2 * float(expected.abs().max()))
    plain = plain_answers(variant, exported, examples, SETTINGS)
    ours = packed_answers(pair, [variant, ORIGIN], examples, 16)[variant.id]
    share = sum(mine.completion != other.completion for mine, other in zip(ours, plain, strict=True)) / len(plain)
    record_property("share of completions that differ in bfloat16", share)
    assert share < 0.2


def test_a_module_that_flattens_its_rows_is_evaluated_one_variant_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, rng = load_resident_pair(tiny_pair(tmp_path, "opt"), "float32"), random.Random(4)
    flat = [name for name in pair.modules if ".fc" in name]
    assert not takes_rows(pair, pair.modules)
    assert takes_rows(pair, [name for name in pair.modules if name not in flat])
    pack = [ORIGIN, Variant.uniform(flat), Variant.uniform(pair.modules)]
    examples = draw_examples(rng, 5)
    monkeypatch.setattr(routed, "_routed", None)  # pointers alone will do
    found = packed_answers(pair, pack, examples, 8)
    for variant in pack:
        with pair.grafted(variant) as resident:
            assert share_of_close(found[variant.id], plain_answers(variant, resident, examples, SETTINGS)) < 0.5


def test_all_modules_of_the_usual_families_take_rows(pair: ResidentPair) -> None:
    assert takes_rows(pair, pair.modules)
    assert not any(module._forward_pre_hooks for module in pair.model.modules())
