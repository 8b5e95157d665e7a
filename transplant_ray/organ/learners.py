"""Learners: which model is trained, which of its parameters have gradients, and what is given away of it afterwards.

    organ      layers alone, in the frozen embedding, final norm and head of the recipient; ships an organ
    in_place   the same layers inside of the whole recipient, all else frozen; ships an organ
    lora       two thin matrices beside every linear map of the layers (peft); ships an adapter that plain peft loads
    full       every parameter; ships a checkpoint

`organ` and `in_place` differ in nothing but what stands around the layers: that tells few layers from the wrapper. All train in
float32 whatever the recipient is stored in; what is shipped has its dtype, but for adapters, which peft keeps as they were trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transplant_ray.errors import CheckpointError, IncompatibleModels, OrganError, RecipeError
from transplant_ray.files import whole_folder
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.header import DTYPES
from transplant_ray.models.loading import load_model, load_tensors
from transplant_ray.models.writing import copy_companions
from transplant_ray.organ.folder import Organ, open_organ, write_organ
from transplant_ray.organ.insertion import MODES, Mode, Placement, plan_insertion
from transplant_ray.organ.resident import Resident
from transplant_ray.organ.stack import read_stack
from transplant_ray.organ.vocabulary import read_vocabulary
from transplant_ray.organ.wrapper import load_wrapper

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Site:
    """Where an organ is put in."""

    mode: Mode
    at: int

    def __str__(self) -> str:
        return f"{self.mode} at {self.at}"


Recovered = Callable[[Site | None], nn.Module]
"""Makes the model of a site. Models of one may share their weights, which are not to be changed."""


class Learner(Protocol):
    method: ClassVar[str]

    @property
    def recipient(self) -> Checkpoint: ...

    def load(self, seed: int) -> nn.Module:
        """What is trained, in float32 on CPU; what is not trained has no gradients. `seed` draws what starts at random."""

    def ship(self, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:
        """Write what is given away. `weights`: what was trained, by its names in the loaded model. RunError where `out` exists."""

    def sites(self, shipped: Path) -> list[Site | None]:
        """Where what was shipped can go; `None` where there is nothing to choose."""

    def recover(self, shipped: Path, device: torch.device) -> Recovered:
        """The recipient with what was shipped, in float32, in evaluation mode: what a receiver has. Files are read once."""


@dataclass(frozen=True)
class OrganLearner:
    recipient: Checkpoint
    organ: Organ
    """As it was before; its folder is read again by whoever loads."""
    method: ClassVar[str] = "organ"

    def load(self, seed: int) -> nn.Module:  # noqa: ARG002  # nothing starts at random
        model: nn.Module = load_wrapper(self.recipient, self.organ)
        return model

    def ship(self, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:
        return _write_organ(self.recipient, self.organ, weights, out, record)

    def sites(self, shipped: Path) -> list[Site | None]:
        """Every position of both modes that the layers can have there."""
        organ, num_layers = open_organ(shipped), len(read_stack(self.recipient).layers)
        every = [Site(mode, at) for mode in MODES for at in range(num_layers + 1)]
        if found := [site for site in every if _can_be(self.recipient, organ, site)]:
            return list(found)
        raise IncompatibleModels(f"{self.recipient.model}: there is no position that the organ can have.")

    def recover(self, shipped: Path, device: torch.device) -> Recovered:
        organ, resident = open_organ(shipped), Resident(torch.float32, str(device))

        def put_in(site: Site | None) -> nn.Module:
            assert site is not None
            model: nn.Module = resident.model(plan_insertion(self.recipient, [Placement(organ, site.at)], site.mode, "warn"))
            return model

        return put_in


@dataclass(frozen=True)
class InPlaceLearner:
    recipient: Checkpoint
    organ: Organ
    """The layers as they are: which they are, and what is shipped looks like."""
    method: ClassVar[str] = "in_place"

    def load(self, seed: int) -> nn.Module:  # noqa: ARG002
        model: nn.Module = load_model(self.recipient, "float32")
        layers = list(model.get_submodule(self.organ.stack.home).children())
        for layer in layers[self._first : self._first + self.organ.num_layers]:
            layer.requires_grad_(True)
        return model

    def ship(self, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:
        home = self.organ.stack.home
        moved = {
            self.organ.stack.name(place, path): weights[name]
            for place, paths in enumerate(self.organ.stack.layers)
            for path in paths
            if (name := f"{home}.{self._first + place}.{path}") in weights
        }
        return _write_organ(self.recipient, self.organ, moved, out, record)

    def sites(self, shipped: Path) -> list[Site | None]:  # noqa: ARG002
        return [Site("replace", self._first)]

    def recover(self, shipped: Path, device: torch.device) -> Recovered:
        return OrganLearner(self.recipient, self.organ).recover(shipped, device)

    @property
    def _first(self) -> int:
        return self.organ.manifest.source.first


@dataclass(frozen=True)
class FullLearner:
    recipient: Checkpoint
    method: ClassVar[str] = "full"

    def load(self, seed: int) -> nn.Module:  # noqa: ARG002
        model: nn.Module = load_model(self.recipient, "float32")
        return model.requires_grad_(True)

    def ship(self, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:  # noqa: ARG002  # a checkpoint has no place for it
        model = cast(PreTrainedModel, with_weights(self.load(0), weights))
        with whole_folder(out) as folder:
            copy_companions(self.recipient, folder)
            for stale in folder.glob("*.safetensors.index.json"):  # of the recipient's shards
                stale.unlink()
            model.to(_stored_dtype(self.recipient)).save_pretrained(folder)
        return out

    def sites(self, shipped: Path) -> list[Site | None]:  # noqa: ARG002
        return [None]

    def recover(self, shipped: Path, device: torch.device) -> Recovered:
        model: nn.Module = load_model(open_checkpoint(str(shipped)), "float32").to(device)
        return lambda _: model


@dataclass(frozen=True)
class LoraLearner:
    recipient: Checkpoint
    rank: int
    alpha: float
    method: ClassVar[str] = "lora"

    def load(self, seed: int) -> nn.Module:
        peft = require_peft()
        model = load_model(self.recipient, "float32")
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"lora:{seed}".encode()).digest()[:8], "big") >> 1)
        maps = linear_maps(model, read_stack(self.recipient).home)
        # a Conv1D of GPT-2 keeps its weight the other way round
        turned = any(isinstance(model.get_submodule(name), Conv1D) for name in maps)
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=maps, fan_in_fan_out=turned, bias="none", task_type="CAUSAL_LM"
        )
        return cast(nn.Module, peft.get_peft_model(model, config))

    def ship(self, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:  # noqa: ARG002  # peft writes the card
        model: Any = with_weights(self.load(0), weights)
        with whole_folder(out) as folder:
            model.save_pretrained(folder, save_embedding_layers=False)
        return out

    def sites(self, shipped: Path) -> list[Site | None]:  # noqa: ARG002
        return [None]

    def recover(self, shipped: Path, device: torch.device) -> Recovered:
        model = load_model(self.recipient, "float32")
        found: nn.Module = require_peft().PeftModel.from_pretrained(model, shipped)
        found = found.eval().requires_grad_(False).to(device)
        return lambda _: found


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """The same model, with what was trained put in."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return model


def linear_maps(model: nn.Module, home: str) -> list[str]:
    """Names of all linear maps in the layers, which are at `home`. CheckpointError where there is none (fused experts are none)."""
    layers = model.get_submodule(home)
    if found := [f"{home}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]:
        return found
    raise CheckpointError(f"{home}: no linear map that LoRA could stand beside. Leave `lora` out.")


def require_peft() -> Any:
    """RecipeError, with the extra that brings it, where peft is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError(
            f"`lora` needs peft, which is not installed ({error}). Install it with `pip install 'transplant-ray[lora]'`, or leave "
            "`methods.lora` out."
        ) from error
    return peft


def _write_organ(recipient: Checkpoint, organ: Organ, weights: Weights, out: Path, record: Mapping[str, Any]) -> Path:
    layout = organ.checkpoint.tensors

    def make(name: str) -> torch.Tensor:  # what has no gradient, if a family has such, stays what it was
        trained = weights.get(name)
        return load_tensors(organ.checkpoint, [name])[name] if trained is None else trained.to(DTYPES[layout[name].dtype])

    return write_organ(
        out,
        layout,
        {name: partial(make, name) for name in layout},
        config=organ.checkpoint.config,
        source=organ.manifest.source,
        vocabulary=read_vocabulary(recipient),
        licence=organ.manifest.licence,
        licences=organ.checkpoint.fetch(),
        training=record,
    )


def _can_be(recipient: Checkpoint, organ: Organ, site: Site) -> bool:
    try:
        plan_insertion(recipient, [Placement(organ, site.at)], site.mode, "warn")
    except (OrganError, IncompatibleModels):
        return False
    return True


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    stack = read_stack(checkpoint)
    return DTYPES[checkpoint.tensors[stack.name(0, stack.layers[0][0])].dtype]
