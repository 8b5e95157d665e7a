"""Drawn variants, prompts and examples, and what plain `transformers` answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from tiny import EOS, VOCABULARY, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Completion, GenerationSettings, left_padded
from transplant_ray.evaluate.outcome import Outcome, answer_examples
from transplant_ray.graft.resident import ResidentPair
from transplant_ray.graft.variant import Coefficient, Variant

HARD, BLENDED = ("target", "all", "nested", "random", "rows"), ("alpha", "channels", "mixed")
Said = Outcome | Completion


def left_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def draw_variant(pair: ResidentPair, rng: random.Random, what: str) -> Variant:
    """`nested`: the first few modules; `rows`: some channels of some; `mixed`: every module by a way of its own."""
    names = list(pair.modules)
    size = rng.randint(1, len(names))

    def coefficient(name: str, kind: str) -> Coefficient:
        if kind in ("channels", "rows"):
            ends = (0.0, 1.0) if kind == "rows" else (0.0, 1.0, rng.random())
            return tuple(rng.choice(ends) for _ in range(pair.modules[name].num_channels))
        return {"target": 0.0, "alpha": rng.random()}.get(kind, 1.0)

    chosen = names if what == "all" else names[:size] if what == "nested" else rng.sample(names, size)
    kinds = ("target", "hard", "alpha", "channels", "rows") if what == "mixed" else (what,)
    return Variant({name: coefficient(name, rng.choice(kinds)) for name in chosen})


def draw_pack(pair: ResidentPair, rng: random.Random, whats: Sequence[str]) -> list[Variant]:
    return [draw_variant(pair, rng, rng.choice(whats)) for _ in range(rng.randint(1, 3))]


def draw_prompts(rng: random.Random, count: int, longest: int = 24) -> list[list[int]]:
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def draw_examples(rng: random.Random, count: int, longest: int = 24) -> list[Rendered]:
    """The references are wrong answers, of different lengths."""
    answers = [(*answer, EOS) for answer in draw_prompts(rng, count, 5)]
    prompts = draw_prompts(rng, count, longest)
    return [Rendered(f"e{i}", tuple(prompt), answers[i], "4") for i, prompt in enumerate(prompts)]


@torch.inference_mode()
def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows, vocabulary) after the last token, padded on the left."""
    ids, mask = left_padded(prompts, 0, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    return logits


def plain_answers(
    variant: Variant, model: PreTrainedModel, examples: Sequence[Rendered], settings: GenerationSettings, scorer: str = "exact"
) -> list[Outcome]:
    return list(answer_examples(variant.id, model, left_tokenizer(), examples, settings, scorer))


def share_of_close(ours: Sequence[Said], plain: Sequence[Said]) -> float:
    """Asserts that they are equal wherever no step was close, and gives the share of those where one was."""
    for mine, other in zip(ours, plain, strict=True):
        assert mine.num_close or mine == replace(other, num_close=0)
    return sum(said.num_close > 0 for said in ours) / len(ours)
