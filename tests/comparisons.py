"""A made-up comparison: what `organ compare` would have found, without a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from transplant_ray.evaluate.learning import find
from transplant_ray.organ.lessons import Learnt, SiteLoss

PARAMETERS: Mapping[str, int] = {"organ": 593_280, "lora": 131_072, "full": 1_864_960}
BYTES: Mapping[str, int] = {"organ": 2_386_331, "lora": 545_312, "full": 7_461_120}
PERPLEXITIES: Mapping[str, tuple[float, float]] = {"organ": (812.0, 1193.0), "lora": (93.4, 131.5), "full": (88.2, 140.1)}
"""On domain and general text, under seed 0; every other seed has a fifth more than the one before it."""
BEFORE = (1207.0, 80.52)
RATES = (3e-4, 1e-3)


def made_comparison(models: Sequence[str] = ("gpt2", "llama"), seeds: Sequence[int] = (0, 1, 2), **changes: Any) -> dict[str, Any]:
    """A summary, as the run folder would have it."""
    before = [learnt(model, "before", BEFORE) for model in models]
    each = [(model, method) for model in models for method in PERPLEXITIES]
    tuned = [
        learnt(model, method, (), stage="tune", lr=lr, seed=1000, select=5.0 - 100 * lr)
        for model, method in each
        for lr in RATES
    ]  # fmt: skip
    confirmed = [
        learnt(model, method, [ppl * 1.2**seed for ppl in PERPLEXITIES[method]], lr=RATES[1], seed=seed, seconds=30.0 + seed)
        for model, method in each
        for seed in seeds
    ]
    everything = (*before, *tuned, *confirmed)
    sides = {"train": {"documents": 10, "blocks": 100}, "test": {"documents": 0, "blocks": 0}}
    summary = {
        "kind": "comparison",
        "name": "made",
        "models": {model: f"models/{model}" for model in models},
        "budget": {
            "tokens": 200_000, "steps": 391, "trainings_to_tune": len(RATES), "seeds": list(seeds), "tuning_seed": 1000,
            "context": 128, "batch": 4, "cpus": 1, "gpus": 0,
        },
        "text": {model: {"training": {"sha256": "0" * 64, **sides, "also_trained_on": 0}} for model in models},
        "said": ["the organ is worse than LoRA on domain text"],
        **find(before, tuned, confirmed).to_json(),
        "learnt": [one.in_short() for one in everything],
        "environment": {"python": "3.12"},
    }  # fmt: skip
    return {**summary, **changes}


def learnt(model: str, method: str, perplexities: Sequence[float], **said: Any) -> Learnt:
    """Of two blocks a text, one as much above its perplexity as the other is below."""
    settings = {"stage": "before" if method == "before" else "confirm", "lr": None, "seed": None, "select": 7.0, **said}
    losses = {text: (log(ppl) - 0.1, log(ppl) + 0.1) for text, ppl in zip(("domain", "general"), perplexities, strict=False)}
    sites = (
        tuple(SiteLoss(mode, at, 7.0 + at, (6.9 + at, 7.1 + at)) for mode in ("insert", "replace") for at in range(4))
        if method == "organ"
        else ()
    )
    return Learnt(
        f"{model}-{method}-{settings['stage']}-{settings['lr']}-{settings['seed']}", model, method, test=losses, sites=sites,
        site="replace at 0" if method == "organ" else None, parameters=PARAMETERS.get(method, 0), bytes=BYTES.get(method, 0),
        **settings,
    )  # fmt: skip
