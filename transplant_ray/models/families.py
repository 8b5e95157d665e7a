"""Decoder families as data: where the layers are, in memory and on disk, and what each projection does.

A family that is not listed is read generically (`guess_role`), and the catalogue says that it is guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

BasicKind = Literal["attn", "ffn"]


@dataclass(frozen=True)
class Role:
    kind: BasicKind
    projection: str
    """What the map does, in one word across families: q, k, v, o, qkv, gate, up, gate_up, down."""


@dataclass(frozen=True)
class Family:
    layers: str
    """Name of the list of layers in the loaded model."""
    roles: Mapping[str, Role]
    """Module path inside a layer → role."""
    disk: tuple[str, ...]
    """Names of the list of layers in checkpoints: the usual one, and what the base class or a wrapper saves."""


def _attn(**paths: str) -> dict[str, Role]:
    return {f"self_attn.{leaf}": Role("attn", projection) for leaf, projection in paths.items()}


def _ffn(**paths: str) -> dict[str, Role]:
    return {f"mlp.{leaf}": Role("ffn", projection) for leaf, projection in paths.items()}


_SPLIT_ATTN = _attn(q_proj="q", k_proj="k", v_proj="v", o_proj="o")
_SPLIT_FFN = _ffn(gate_proj="gate", up_proj="up", down_proj="down")
_LLAMA_ROLES = MappingProxyType(_SPLIT_ATTN | _SPLIT_FFN)
_GPT_OSS_ROLES = MappingProxyType(_SPLIT_ATTN)  # its experts and their router are no linear maps
_PHI3_ROLES = MappingProxyType(_attn(qkv_proj="qkv", o_proj="o") | _ffn(gate_up_proj="gate_up", down_proj="down"))
_GPT2_ROLES = MappingProxyType(
    {
        "attn.c_attn": Role("attn", "qkv"),
        "attn.c_proj": Role("attn", "o"),
        "mlp.c_fc": Role("ffn", "up"),
        "mlp.c_proj": Role("ffn", "down"),
    }
)
_NEOX_ROLES = MappingProxyType(
    {
        "attention.query_key_value": Role("attn", "qkv"),
        "attention.dense": Role("attn", "o"),
        "mlp.dense_h_to_4h": Role("ffn", "up"),
        "mlp.dense_4h_to_h": Role("ffn", "down"),
    }
)
_LLAMA_LIKE = Family("model.layers", _LLAMA_ROLES, disk=("model.layers", "layers"))

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA_LIKE,
        "mistral": _LLAMA_LIKE,
        "qwen2": _LLAMA_LIKE,
        "qwen3": _LLAMA_LIKE,
        "gemma": _LLAMA_LIKE,
        "gemma2": _LLAMA_LIKE,
        "gemma3_text": _LLAMA_LIKE,
        "gpt_oss": Family("model.layers", _GPT_OSS_ROLES, disk=("model.layers", "layers")),
        "phi3": Family("model.layers", _PHI3_ROLES, disk=("model.layers", "layers")),
        "gpt2": Family("transformer.h", _GPT2_ROLES, disk=("transformer.h", "h")),
        "gpt_neox": Family("gpt_neox.layers", _NEOX_ROLES, disk=("gpt_neox.layers", "layers")),
    }
)

_ATTN_WORDS = ("attn", "attention")
_FFN_WORDS = frozenset({"mlp", "ffn", "feed_forward", "ff", "fc"})
_PROJECTIONS = tuple(dict.fromkeys(role.projection for family in FAMILIES.values() for role in family.roles.values()))


def guess_role(path: str) -> Role | None:
    """Role of a module of an unknown family from the words of its path; None where no word tells."""
    leaf = path.rpartition(".")[2]
    projection = next((known for known in _PROJECTIONS if leaf in (f"{known}_proj", known)), leaf)
    words = {word for part in path.lower().split(".") for word in (part, *part.split("_"), part.rstrip("0123456789"))}
    if any(known in word for word in words for known in _ATTN_WORDS):
        return Role("attn", projection)
    if words & _FFN_WORDS:
        return Role("ffn", projection)
    return None
