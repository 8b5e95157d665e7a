"""Tiny models with random weights, a character tokenizer and task files: what tests are made of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

SPECIAL = ("<pad>", "<s>", "</s>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +=:?.\n"
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
PAD, BOS, EOS = range(3)

_SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA_SHAPE),
    "mistral": (MistralConfig, {**_LLAMA_SHAPE, "sliding_window": 16}),
    "qwen2": (Qwen2Config, _LLAMA_SHAPE),
    "qwen3": (Qwen3Config, {**_LLAMA_SHAPE, "head_dim": 8}),
    "phi3": (Phi3Config, _LLAMA_SHAPE),
    "gemma2": (Gemma2Config, {**_LLAMA_SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_text": (Gemma3TextConfig, {**_LLAMA_SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gpt2": (GPT2Config, {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": (GPTNeoXConfig, {k: v for k, v in _LLAMA_SHAPE.items() if k != "num_key_value_heads"}),
    "opt": (
        OPTConfig,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 128, "word_embed_proj_dim": 32,
        },
    ),
}  # fmt: skip
"""Family → config class and shape. `opt` stands for a family that the package does not list."""

MORE_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "gemma": (GemmaConfig, {**_LLAMA_SHAPE, "head_dim": 8}),
    "gpt_oss": (
        GptOssConfig,
        {
            **_LLAMA_SHAPE, "head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip
"""Families whose layers are moved whole: one that is read as Llama, and one with experts in them."""

DEEP_FAMILIES = ("llama", "phi3", "gemma2", "gpt2")
"""Families that every floor is tested on."""
DEAR_FAMILIES = [pytest.param(each, marks=[] if each in ("phi3", "gpt2") else pytest.mark.slow) for each in DEEP_FAMILIES]
"""The same, where a test is dear: `.ci/run` takes one with fused and one with transposed maps, `make test` all."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    make, shape = {**CONFIGS, **MORE_CONFIGS}[family]
    return make(**{**shape, **_SPECIAL_IDS, **changes})


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Random weights, large enough that greedy tokens differ between seeds and modules matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def tiny_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; `<s>` is added in front; padding on the left is not the default, as with most checkpoints."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *characters))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, shard: str = "50GB", **changes: Any) -> Path:
    """A checkpoint folder with model and tokenizer; `shard="20KB"` splits it."""
    tiny_model(family, seed, **changes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_pair(folder: Path, family: str = "llama", **changes: Any) -> Comparison:
    """Source (seed 1) and target (seed 2) on disk, compared."""
    source = save_tiny(folder / "source", family, seed=1, **changes)
    target = save_tiny(folder / "target", family, seed=2, **changes)
    return compare(open_checkpoint(str(source)), open_checkpoint(str(target)))


def write_task(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """Sums of two numbers, one JSON object a line, no duplicates."""
    sums = random.Random(seed).sample([(a, b) for a in range(30) for b in range(30)], rows)
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in sums))
    return path


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A whole small recipe for the tiny pair in `folder`; `changes` replace top-level keys."""
    recipe = {
        "name": "tiny",
        "source": {"model": "./source"},
        "target": {"model": "./target"},
        "task": {
            "data": str(write_task(folder / "task.jsonl")),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "max_new_tokens": 4,
            "split": {"probe": 8, "select": 12, "test": 10, "seed": 1},
        },
        "sweep": {"k": [1, 3], "kind": ["attn", "all"]},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "storage": str(folder / "runs"),
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path
