"""What a config says of its layers: of what kind each is, and all that an organ and its recipient must share.

Only settings that are known to touch no layer are left aside: what a later version of transformers adds counts until it is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from transplant_ray.models.compare import unequal

LayerType = str | None
"""`full_attention`, `sliding_attention`; None in a family whose layers are all alike."""

COUNT, TYPES, WINDOW_START = "num_hidden_layers", "layer_types", "max_window_layers"
BY_LAYER = frozenset({COUNT, TYPES, WINDOW_START, "sliding_window_pattern", "_sliding_window_pattern"})
"""How many layers there are, and of what type: these are written anew."""
OUTSIDE = frozenset(
    {
        "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "final_logit_softcapping",
        "torch_dtype", "_attn_implementation",
    }
)  # fmt: skip
"""What embedding, head and loader are told; vocabularies are compared by themselves."""
TRAINING = frozenset(
    {
        "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "classifier_dropout",
        "initializer_range", "router_aux_loss_coef", "output_router_logits", "use_cache", "pretraining_tp",
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "task_specific_params", "is_decoder",
    }
)  # fmt: skip
"""What has no say in a forward pass."""
REACH = ("max_position_embeddings", "original_max_position_embeddings")
"""How many positions a model was built for: a plain RoPE does not ask, all others do."""
BY_INDEX = ("scale_attn_by_inverse_layer_idx",)
"""Switches that make a layer compute by its own index (GPT-2)."""


def layer_types(config: PretrainedConfig) -> tuple[LayerType, ...]:
    """The type of every layer, also where the config leaves it to a pattern (every second one, every sixth, the last ones)."""
    return tuple(getattr(config, TYPES, None) or [None] * config.num_hidden_layers)


def layer_settings(config: PretrainedConfig, types: Sequence[LayerType]) -> dict[str, Any]:
    """What a config has to say otherwise, by the keys of its family, to have layers of these types."""
    settings: dict[str, Any] = {_own_key(config, COUNT): len(types)}
    if None not in types:
        settings[TYPES] = list(types)
        start = _window_start(types)
        if start is not None and getattr(config, WINDOW_START, None) is not None and config.sliding_window is not None:
            settings[WINDOW_START] = start  # transformers goes by the list; others may go by this
    return {key: value for key, value in settings.items() if getattr(config, key) != value}


def with_layers(config: PretrainedConfig, types: Sequence[LayerType]) -> PretrainedConfig:
    """The same config for layers of these types."""
    return type(config).from_dict({**config.to_dict(), **layer_settings(config, types)})


def differing_settings(organ: PretrainedConfig, recipient: PretrainedConfig) -> list[str]:
    """Each setting that decides what a layer computes and is not the same in both, in words; one a line."""
    ours, theirs = layer_traits(recipient), layer_traits(organ)
    plain = _plain_rope(organ) and _plain_rope(recipient)
    return [
        f"`{name}` is {_shown(here)} in the organ and {_shown(there)} in the recipient"
        for key in sorted(ours.keys() | theirs.keys())
        if not (plain and key in REACH)
        for name, here, there in unequal(key, theirs.get(key), ours.get(key))
    ]


def layer_traits(config: PretrainedConfig) -> Mapping[str, Any]:
    """All that a config says of what one layer computes, under the names that families share."""
    shared = {own: name for name, own in type(config).attribute_map.items()}
    said = {shared.get(key, key): value for key, value in config.to_dict().items()}
    aside = PretrainedConfig().to_dict().keys() - {"model_type"} | BY_LAYER | OUTSIDE | TRAINING
    return {key: value for key, value in said.items() if key not in aside}


def depends_on_index(config: PretrainedConfig) -> str | None:
    """The switch by which layers of this config compute by their own index; None where they do not."""
    return next((key for key in BY_INDEX if getattr(config, key, False)), None)


def _own_key(config: PretrainedConfig, key: str) -> str:
    return str(type(config).attribute_map.get(key, key))


def _window_start(types: Sequence[LayerType]) -> int | None:
    """The layer from which on all slide, and before which none does; None for any other pattern."""
    start = next((index for index, kind in enumerate(types) if kind == "sliding_attention"), len(types))
    return start if all(kind == "sliding_attention" for kind in types[start:]) else None


def _plain_rope(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    return all(part.get("rope_type", "default") == "default" for part in sets)


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
