"""Which modules source and target can exchange, which not and why, and where equal shapes mean different things."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transplant_ray.errors import IncompatibleModels
from transplant_ray.models.catalogue import Catalogue, Exclusion, Module, read_catalogue
from transplant_ray.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Pair:
    """A compatible pair: same canonical name, same shape."""

    source: Module
    target: Module

    @property
    def name(self) -> str:
        return self.target.name


@dataclass(frozen=True)
class Comparison:
    source: Checkpoint
    target: Checkpoint
    pairs: Mapping[str, Pair]
    """Compatible pairs by canonical name, in order of layers."""
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]
    num_layers: int

    @property
    def modules(self) -> tuple[Module, ...]:
        """The target's side of every pair, in order of layers."""
        return tuple(pair.target for pair in self.pairs.values())


MEANING = {
    "architecture": ("model_type",),
    "positions": ("rope_parameters", "partial_rotary_factor", "position_embedding_type", "max_position_embeddings"),
    "norm": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "activation function": ("hidden_act", "hidden_activation", "activation_function"),
    "attention scaling or soft-caps": (
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier",
        "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    ),
    "attention window": ("sliding_window", "layer_types"),
    "residual path": ("use_parallel_residual",),
    "heads": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "vocabulary size": ("vocab_size",),
    "end tokens": ("eos_token_id",),
    "width": ("hidden_size",),
    "number of layers": ("num_hidden_layers",),
}  # fmt: skip
"""Config keys that change what equal shapes mean, by what they decide (method.md, "Modules and compatibility").

transformers reads GPT-2's own keys (`n_head`) by these names too, and folds older RoPE keys into `rope_parameters`; the
longest position counts because a long RoPE is scaled by it.
"""


def compare(source: Checkpoint, target: Checkpoint) -> Comparison:
    """Compare two checkpoints by config and headers. IncompatibleModels where not one module fits."""
    ours, theirs = read_catalogue(target), read_catalogue(source)
    pairs: dict[str, Pair] = {}
    excluded = [Exclusion(e.name, f"target: {e.reason}") for e in ours.excluded]
    gone = {e.name: e.reason for e in theirs.excluded}
    for name, module in ours.modules.items():
        other = theirs.modules.get(name)
        if other is not None and _fits(other, module):
            pairs[name] = Pair(other, module)
        else:
            excluded.append(Exclusion(name, _reason(other, module, gone.get(name))))
    excluded += [Exclusion(name, "missing: the target has no such module") for name in theirs.modules if name not in ours.modules]
    if not pairs:
        raise IncompatibleModels(_no_pair(source, target, excluded))
    warnings = (*_guesses(ours, theirs), *_differences(source.config, target.config))
    return Comparison(source, target, pairs, tuple(excluded), warnings, ours.num_layers)


def check_vocabulary(source: Mapping[str, int], target: Mapping[str, int], accept: Iterable[str]) -> None:
    """Refuse tokenizers whose token ids differ, for one rendering feeds both models."""
    if source == target or "vocabulary" in accept:
        return
    differing = sorted(token for token in source.keys() | target.keys() if source.get(token) != target.get(token))
    token = differing[0]
    raise IncompatibleModels(
        f"vocabulary: {len(differing)} tokens differ, e.g. {token!r} is {source.get(token)} in the source and "
        f"{target.get(token)} in the target. Both models read the target's token ids; choose models of one family, "
        "or add `accept: [vocabulary]`."
    )


def check_segmentation(prompts: Iterable[str], source: Any, target: Any, accept: Iterable[str]) -> None:
    """Refuse tokenizers that cut the task's own prompts differently. `source` and `target` are callables text → ids."""
    if "segmentation" in accept or "vocabulary" in accept:
        return
    for prompt in prompts:
        ours, theirs = list(target(prompt)), list(source(prompt))
        if ours != theirs:
            raise IncompatibleModels(
                f"segmentation: the prompt {prompt[:60]!r} is {len(theirs)} tokens in the source and {len(ours)} in the target, "
                "or other ones. Both models read the target's tokens; add `accept: [segmentation]` if that is meant."
            )


def _fits(source: Module, target: Module) -> bool:
    return (source.shape, source.transposed, source.disk_bias is None) == (
        target.shape, target.transposed, target.disk_bias is None,
    )  # fmt: skip


def _reason(source: Module | None, target: Module, gone: str | None) -> str:
    if source is None:
        return f"source: {gone}" if gone else "missing: the source has no such module"
    if source.shape != target.shape:
        return f"shape: source is {source.shape}, target is {target.shape}"
    if source.transposed != target.transposed:
        return "layout: one of the two stores the transposed weight"
    return "bias: only one of the two has one"


def _no_pair(source: Checkpoint, target: Checkpoint, excluded: list[Exclusion]) -> str:
    lines = "\n".join(f"  {e.name}: {e.reason}" for e in excluded[:3])
    return (
        f"no compatible module between source {source.model} ({source.config.model_type}) and target {target.model} "
        f"({target.config.model_type}):\n{lines}\nChoose two models of one family and size."
    )


def _guesses(*catalogues: Catalogue) -> list[str]:
    families = sorted({c.family for c in catalogues if c.guessed})
    return [f"{family}: an unknown family; layers and roles are guessed from names" for family in families]


def _differences(source: PretrainedConfig, target: PretrainedConfig) -> list[str]:
    return [
        f"{what}: `{name}` is {reprlib.repr(theirs)} in the source and {reprlib.repr(ours)} in the target"
        for what, keys in MEANING.items()
        for key in keys
        for name, theirs, ours in unequal(key, getattr(source, key, None), getattr(target, key, None))
    ]


def unequal(key: str, source: Any, target: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs under a config key: of two dictionaries only the entries that do, for a RoPE table is long."""
    if isinstance(source, dict) and isinstance(target, dict):
        for part in sorted(source.keys() | target.keys()):
            yield from unequal(f"{key}.{part}", source.get(part), target.get(part))
    elif source != target:
        yield key, source, target
