"""The pairs of small models that `build_zoo.py` trains: three that ship with the package, two that only studies use.

A pair is data: a configuration, the mixture that both models learnt first (`common`), and what each of them was trained
on afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig
from zoo_tasks import BOS, EOS, PAD, VOCABULARY


@dataclass(frozen=True)
class Stage:
    """One stretch of training: which abilities in which shares, for how long, and how many rows as chat turns.

    With `rank`, every linear map of the layers learns a change of that rank only, merged into the weights at the end.
    """

    mixture: Mapping[str, float]
    steps: int
    seed: int
    peak_lr: float = 3e-3
    batch_size: int = 64
    chat_share: float = 0.0
    rank: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two models with one past. A source without a stage of its own is the model after `common`."""

    name: str
    mirrors: str
    config: PreTrainedConfig
    tasks: Mapping[str, str]
    common: Stage
    target: Stage
    source: Stage | None = None
    target_has_chat_template: bool = False
    seed: int = 0

    def reseeded(self, number: int) -> "Pair":
        """The same pair under the n-th training seed: other first weights, other training rows, other task rows; 0 is itself."""
        moved = {
            role: replace(stage, seed=stage.seed + 1000 * number)
            for role in ("common", "source", "target")
            if (stage := getattr(self, role))
        }
        return replace(self, seed=self.seed + 1000 * number, **moved)


def shared_settings(**settings) -> dict:
    """What the architectures with rotary positions are given alike."""
    common = {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[BOS],
        "eos_token_id": VOCABULARY[EOS],
        "initializer_range": 0.05,
    }
    return common | settings


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="cross-generation",
            mirrors="two generations of one model line: generation 2 is generation 1 trained on",
            config=Phi3Config(
                **shared_settings(hidden_size=80, intermediate_size=128, num_hidden_layers=7),
                num_attention_heads=4,
                num_key_value_heads=4,
                original_max_position_embeddings=256,
            ),
            tasks={"lost": "arithmetic", "shared": "reversal", "target_only": "sorting"},
            common=Stage({"arithmetic": 0.6, "reversal": 0.4}, steps=1500, seed=11),
            target=Stage({"sorting": 0.6, "reversal": 0.39, "arithmetic": 0.01}, steps=700, seed=12),
            seed=1,
        ),
        Pair(
            name="base-instruct",
            mirrors="a base model and the instruct model made from it",
            config=Gemma2Config(
                **shared_settings(hidden_size=96, intermediate_size=256, num_hidden_layers=4),
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=24,
                query_pre_attn_scalar=24,
                sliding_window=64,
            ),
            tasks={"lost": "caesar", "shared": "uppercase", "target_only": "doubling"},
            common=Stage({"caesar": 0.6, "uppercase": 0.4}, steps=1000, seed=21),
            target=Stage({"doubling": 0.6, "uppercase": 0.399, "caesar": 0.001}, steps=700, seed=22, chat_share=0.4),
            target_has_chat_template=True,
            seed=2,
        ),
        Pair(
            name="siblings",
            mirrors="two models trained on from one ancestor, on overlapping mixtures: the mild case",
            config=LlamaConfig(
                **shared_settings(hidden_size=80, intermediate_size=256, num_hidden_layers=5),
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
            tasks={"lost": "sorting", "shared": "reversal", "target_only": "interleaving"},
            common=Stage({"sorting": 0.3, "reversal": 0.4, "interleaving": 0.3}, steps=900, seed=31),
            source=Stage({"sorting": 0.699, "reversal": 0.3, "interleaving": 0.001}, steps=500, seed=32),
            target=Stage({"interleaving": 0.69, "reversal": 0.3, "sorting": 0.01}, steps=500, seed=33),
            seed=3,
        ),
    )
}

STUDIED = {
    pair.name: pair
    for pair in (
        Pair(
            name="low-rank",
            mirrors="a model and what a merged low-rank adapter made of it",
            config=MistralConfig(
                **shared_settings(hidden_size=80, intermediate_size=192, num_hidden_layers=5),
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
            tasks={"lost": "interleaving", "shared": "uppercase", "target_only": "doubling"},
            common=Stage({"interleaving": 0.5, "uppercase": 0.5}, steps=800, seed=41),
            target=Stage({"doubling": 0.6, "uppercase": 0.4}, steps=400, seed=42, rank=8),
            seed=4,
        ),
        Pair(
            name="older-design",
            mirrors="a model with learnt positions and transposed projections, trained on for other tasks",
            config=GPT2Config(
                vocab_size=len(VOCABULARY),
                n_positions=256,
                n_embd=80,
                n_layer=6,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=0.05,
                pad_token_id=VOCABULARY[PAD],
                bos_token_id=VOCABULARY[BOS],
                eos_token_id=VOCABULARY[EOS],
            ),
            tasks={"lost": "caesar", "shared": "reversal", "target_only": "sorting"},
            common=Stage({"caesar": 0.5, "reversal": 0.5}, steps=1000, seed=51),
            target=Stage({"sorting": 0.6, "reversal": 0.395, "caesar": 0.005}, steps=500, seed=52),
            seed=5,
        ),
    )
}
"""Pairs that no package carries: comparisons over pairs and training seeds use them beside the zoo's."""
