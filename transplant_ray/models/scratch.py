"""Small models from nothing: a tokenizer that is trained on text, and architectures with first weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PretrainedConfig

END = "<|end|>"
"""Between documents; also where a tokenizer is asked for padding."""
LLAMA_GROUP = 2
"""Query heads to a pair of key and value heads."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, as GPT-2's: every text comes back as it was. The end token has id 0; fewer tokens than
    `vocabulary` where the text is too short for so many."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """OSError where there is no room."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what the tokenizers library raises is nothing narrower
        raise OSError(str(error)) from error


def small_config(family: str, *, vocabulary: int, layers: int, width: int, heads: int, context: int) -> PretrainedConfig:
    """GPT-2's or Llama's architecture in small, without dropout: the training reads most of its text once."""
    ids = {"bos_token_id": 0, "eos_token_id": 0}  # no padding: transformers would warn of ends in the text
    return _CONFIGS[family]({"vocab_size": vocabulary, **ids}, layers=layers, width=width, heads=heads, context=context)


def first_weights(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A new model in float32; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _gpt2(shared: Mapping[str, Any], *, layers: int, width: int, heads: int, context: int) -> PretrainedConfig:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=context, **dropout, **shared)


def _llama(shared: Mapping[str, Any], *, layers: int, width: int, heads: int, context: int) -> PretrainedConfig:
    groups = heads // LLAMA_GROUP if heads % LLAMA_GROUP == 0 else heads
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=round(8 * width / 3 / 8) * 8, max_position_embeddings=context, **shared,
    )  # fmt: skip


_CONFIGS = MappingProxyType({"gpt2": _gpt2, "llama": _llama})
SMALL_FAMILIES = tuple(_CONFIGS)
