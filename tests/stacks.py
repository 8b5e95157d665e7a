"""Models and organs of every family whose layers can be moved, and what `transformers` makes of layers moved in memory."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.loading import load_tensors
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ, write_organ

NUM_LAYERS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen3": {},
    "phi3": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 3},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
}
"""Family → what makes its layers differ from one another."""
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
CUT = "1-3"
"""The layers of the source that are the organ: of two types, wherever a family has two."""


@dataclass(frozen=True)
class Pair:
    family: str
    source: Checkpoint
    recipient: Checkpoint
    organ: Organ
    """Layers 1 to 3 of the source."""

    @property
    def layers(self) -> str:
        """Where the list of layers is in the loaded model."""
        return LAYERS.get(self.family, "model.layers")


def save_model(
    folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes: Any
) -> Path:
    """Norms and biases are drawn too: those of a new model are alike in all layers, and one in another's place would go unseen."""
    count = {"n_layer" if family == "gpt2" else "num_hidden_layers": NUM_LAYERS}
    model = tiny_model(family, seed, **{**FAMILIES[family], **count, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_pair(folder: Path, family: str = "llama", **changes: Any) -> Pair:
    source = open_checkpoint(str(save_model(folder / "source", family, 1, **changes)))
    recipient = open_checkpoint(str(save_model(folder / "recipient", family, 2, **changes)))
    return Pair(family, source, recipient, open_organ(extract_organ(source, CUT, folder / "organ")))


Origin = tuple[Checkpoint, int]
"""A model and one of its layers."""


def restacked(pair: Pair, origins: Sequence[Origin], types: Sequence[str] | None = None) -> PreTrainedModel:
    """The recipient in memory with other layers in its list, by nothing of ours."""
    models = {folder: load(folder) for folder in {checkpoint.folder for checkpoint, _ in origins}}
    layers = [deepcopy(models[checkpoint.folder].get_submodule(pair.layers)[index]) for checkpoint, index in origins]
    model = load(pair.recipient.folder)
    home, _, leaf = pair.layers.rpartition(".")
    setattr(model.get_submodule(home), leaf, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    if types is not None:
        model.config.layer_types = list(types)
    return model


def load(folder: Path | None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def types_of(origins: Sequence[Origin]) -> list[str] | None:
    """The type of each layer as its own model's config has it."""
    types = [getattr(checkpoint.config, "layer_types", None) for checkpoint, _ in origins]
    return None if None in types else [own[index] for own, (_, index) in zip(types, origins, strict=True)]


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """(2, 40, vocabulary): longer than the sliding windows."""
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@torch.inference_mode()
def greedy(model: PreTrainedModel) -> list[int]:
    """Tokens that are decoded with a cache, past the sliding windows."""
    ids = torch.arange(3, 15)[None]
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    tokens: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    return tokens


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained_copy(organ: Organ, out: Path, **record: Any) -> Organ:
    """The organ with every weight a little larger, and a record of a training."""
    tensors = load_tensors(organ.checkpoint, organ.checkpoint.tensors)
    write_organ(
        out,
        organ.checkpoint.tensors,
        {name: lambda tensor=tensor: tensor * 1.05 for name, tensor in tensors.items()},
        config=organ.checkpoint.config,
        source=organ.manifest.source,
        vocabulary=organ.manifest.vocabulary,
        licence=None,
        training={"before": organ.manifest.fingerprint, "earlier": None, **record},
    )
    return open_organ(out)
