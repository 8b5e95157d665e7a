"""`scorer: loss`: what a reference costs, held against plain `transformers`, one row at a time."""

from __future__ import annotations

import json
import random
from math import exp
from pathlib import Path

import pytest
import torch
from draw import draw_examples, draw_variant, left_tokenizer
from scipy.stats import sem, ttest_1samp
from tiny import EOS, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from transplant_ray.errors import DataError
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.choosing import Guarded, weigh
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.metrics import perplexity, perplexity_kept
from transplant_ray.evaluate.outcome import Outcome, Tally, answer_examples
from transplant_ray.evaluate.prepared import prepare_task
from transplant_ray.evaluate.results import guard_result, make_result
from transplant_ray.graft.plan import Planned
from transplant_ray.graft.resident import ResidentPair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.recipe import ObjectiveSpec, TaskSpec

SETTINGS = GenerationSettings(4, (EOS,), batch_size=5)


@torch.inference_mode()
def plain_loss(model: PreTrainedModel, example: Rendered) -> float:
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].float()
    return float(cross_entropy(logits, torch.tensor(example.answer_ids)))


@pytest.mark.parametrize("family", ["phi3", "gemma2", "gpt2"])
def test_a_model_by_itself(family: str) -> None:
    model, examples = tiny_model(family, 1), draw_examples(random.Random(3), 12)
    outcomes = answer_examples("v", model, left_tokenizer(), examples, SETTINGS, "loss")
    assert [outcome.loss for outcome in outcomes] == pytest.approx([plain_loss(model, example) for example in examples], rel=1e-4)
    assert [outcome.score for outcome in outcomes] == [-outcome.loss for outcome in outcomes if outcome.loss is not None]


def test_many_variants_at_once(pair: ResidentPair) -> None:
    rng = random.Random(4)
    examples = draw_examples(rng, 9)
    variants = [ORIGIN, *(draw_variant(pair, rng, "hard") for _ in range(4))]
    engine = Engine(pair, left_tokenizer(), SETTINGS, "loss")
    shards = {shard.variant: shard for shard in engine.answer(variants, examples)}
    means = engine.losses(variants, examples)
    for variant in variants:
        tally = Tally.of(shards[variant.id].outcomes, 0.0)
        assert [outcome.example for outcome in shards[variant.id].outcomes] == [example.id for example in examples]
        assert tally.loss == pytest.approx(means[variant.id], rel=1e-5)
        assert tally.score == -tally.loss
    assert len({round(mean or 0, 4) for mean in means.values()}) > 1


def test_a_loss_that_is_no_number_is_a_failed_variant(pair: ResidentPair) -> None:
    name = next(iter(pair.modules))
    weight = pair.grafts[name].source.weight
    kept = weight.clone()
    weight.fill_(torch.nan)
    broken = Variant.uniform([name], 1.0)
    shards = list(Engine(pair, left_tokenizer(), SETTINGS, "loss").answer([broken, ORIGIN], draw_examples(random.Random(1), 3)))
    weight.copy_(kept)
    assert {shard.variant: shard.error is None for shard in shards} == {broken.id: False, ORIGIN.id: True}


# Counted.


def outcomes(losses: list[float], variant: str = "v") -> tuple[Outcome, ...]:
    return tuple(Outcome(variant, f"e{i}", "", False, 3, True, loss=loss) for i, loss in enumerate(losses))


def test_a_tally_of_losses() -> None:
    losses = [0.5, 2.0, 1.0, 4.5]
    tally = Tally.of(outcomes(losses), 1.0)
    interval = ttest_1samp(losses, 0).confidence_interval(0.95)
    assert (tally.loss, tally.score, tally.score_error) == pytest.approx((2.0, -2.0, float(sem(losses))))
    assert interval.low < 0
    assert tally.interval == pytest.approx((0.0, interval.high))  # no loss is less than 0
    assert (Tally.of(outcomes([1.5]), 0).interval, Tally.of(outcomes([1.5]), 0).score_error) == (None, 0.0)


def test_shards_of_losses_add_up() -> None:
    answers = Answers()
    answers.add("select", VariantShard("v", outcomes([0.5, 2.0]), 1.0))
    answers.add("select", VariantShard("v", outcomes([0.5, 2.0, 1.0])[2:], 1.0))
    assert answers.tallies["select"]["v"].losses == (0.5, 2.0, 1.0)
    scores = answers.scores("select", "v", ["e2", "e0", "e1"])
    assert scores is not None
    assert scores.tolist() == [-1.0, -0.5, -2.0]
    assert answers.scores("select", "v", ["e3"]) is None


def test_rows_of_losses_say_losses_and_no_accuracy() -> None:
    planned = Planned("trial", ORIGIN, "depth", "all", 1, 1.0)
    source, target, mine = (Tally.of(outcomes(losses), 1.0) for losses in ([1.0, 1.0], [3.0, 3.0], [1.0, 2.0]))
    row = make_result(planned, mine, "select", {}, target=target, source=source)
    assert (row.accuracy, row.correct, row.tir, row.parsed) == (None,) * 4
    assert (row.loss, row.value, row.score, row.worth, row.recovery) == (1.5, 1.5, -1.5, -1.5, 0.75)
    guard = guard_result(planned, "text", "select", target, source, held_out=False)
    assert (guard.accuracy, guard.loss, guard.share) == (None, 3.0, exp(1.0 - 3.0))
    assert guard.share == perplexity_kept(3.0, target=1.0)


def test_a_guard_that_loses_nats_has_a_price_and_a_veto() -> None:
    target, variant = (Tally.of(outcomes(losses), 0) for losses in ([1.0, 1.0], [1.2, 1.4]))
    guard = Guarded("text", target, variant, margin=0.25)
    objective = ObjectiveSpec(price=0.5, veto=True)
    candidate = weigh(Tally(10, 6, 0.0), [guard], objective, 1, 1)
    assert candidate.worth == pytest.approx(0.6 - 0.5 * 0.3)
    assert candidate.vetoed_by == "text"


# Read.


def write(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_task(data: str, prompt: str = "") -> TaskSpec:
    return TaskSpec(data=data, prompt=prompt, answer="{text}", scorer="loss", split={"probe": 1, "select": 1, "test": 1})


@pytest.mark.parametrize("begins", [True, False])
def test_plain_text_is_a_task(tmp_path: Path, begins: bool) -> None:
    """Nothing stands before it but the token that begins every text; where there is none, the first token is the prompt."""
    texts = ["one two", "three four five", "six seven eight nine"]
    tokenizer = tiny_tokenizer()
    if not begins:
        tokenizer.backend_tokenizer.post_processor = None
    task = prepare_task(text_task(write(tmp_path, [{"text": text} for text in texts])), tokenizer)
    rendered = [example for split in task.examples.values() for example in split]
    read = {(len(e.prompt_ids), tokenizer.decode([*e.prompt_ids, *e.answer_ids[:-1]])) for e in rendered}
    assert read == {(1, f"<s>{text}" if begins else text) for text in texts}
    assert set(task.prompts.values()) == set(texts)
    assert task.max_new_tokens == max(len(example.answer_ids) for example in rendered)


def test_a_text_of_one_token_has_nothing_to_predict(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="none is left to predict"):
        prepare_task(text_task(write(tmp_path, [{"text": text} for text in ("a", "bb", "ccc")])), tokenizer)


def test_a_prompt_that_is_always_the_same_is_told_apart_from_duplicates(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": text} for text in ("a", "b", "c")])
    with pytest.raises(DataError, match='Of plain text it is empty: `prompt: ""`'):
        prepare_task(text_task(data, prompt="Read this:"), tiny_tokenizer())


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_read_must_fit_row_by_row(pair: ResidentPair, reads: bool) -> None:
    """A long prompt with a short answer and the other way round fit, whatever the two longest would make together."""
    long, short = tuple([5] * 100), (6,)
    examples = [Rendered("a", long, short, "x"), Rendered("b", short, long, "y")]
    engine = Engine(pair, left_tokenizer(), SETTINGS, "loss" if reads else "exact")
    if reads:
        assert all(shard.error is None for shard in engine.answer([ORIGIN], examples))
    assert engine.losses([ORIGIN], examples)[ORIGIN.id] is not None
    with pytest.raises(DataError, match="have 200 tokens, which exceed the model's 128 positions"):
        engine.losses([ORIGIN], [Rendered("c", long, long, "z")])


def test_a_loss_beyond_all_numbers_has_no_perplexity() -> None:
    assert perplexity(1.0) == exp(1.0)
    assert perplexity(800.0) is None
    assert perplexity_kept(1.0, target=900.0) is None


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": text} for text in ("a", "b", "a", "c")])
    with pytest.raises(DataError, match=r"1 duplicate examples, e\.g\. 'a' is there 2 times"):
        prepare_task(text_task(data), tiny_tokenizer())


@pytest.mark.parametrize(("given", "why"), [({"max_new_tokens": 5}, "decodes nothing"), ({"stop": ["x"]}, "decodes nothing")])
def test_settings_without_effect_are_refused(given: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TaskSpec.model_validate({"data": "a.jsonl", "prompt": "", "answer": "{text}", "scorer": "loss", **given})
