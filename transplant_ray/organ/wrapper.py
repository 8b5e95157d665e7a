"""What an organ is trained in: a recipient's embedding, the organ's layers, the recipient's final norm and head.

It is the recipient's own class with a config of so many layers, loaded by `transformers`: nothing of masks or positions is ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from transplant_ray.errors import IncompatibleModels
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.loading import assemble, load_tensors
from transplant_ray.organ.folder import Organ
from transplant_ray.organ.insertion import Placement, check_compatible
from transplant_ray.organ.settings import depends_on_index, with_layers
from transplant_ray.organ.stack import read_stack, split_name
from transplant_ray.organ.vocabulary import VocabularyChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_wrapper(recipient: Checkpoint, organ: Organ, vocabulary: VocabularyChoice = "refuse") -> tuple[str, ...]:
    """Warnings; IncompatibleModels where the organ does not fit the recipient, or layers would compute by another index."""
    switch = depends_on_index(recipient.config)
    if switch is not None and organ.manifest.source.first:
        raise IncompatibleModels(
            f"{recipient.model}: with `{switch}` a layer computes by its own index, and alone layer {organ.manifest.source.first} "
            "would be layer 0. Such layers can only be trained where they are; take the first ones."
        )
    return check_compatible(recipient, [Placement(organ, 0)], vocabulary)


def load_wrapper(recipient: Checkpoint, organ: Organ) -> PreTrainedModel:
    """The model in float32 on CPU; only the organ's parameters have gradients. Of the recipient's layers nothing is read."""
    stack = read_stack(recipient)
    outside = [name for name in recipient.tensors if split_name(name, stack.prefix) is None]
    here = replace(recipient, folder=recipient.fetch({recipient.tensors[name].file for name in outside}))
    tensors = load_tensors(here, outside, torch.float32)
    for layer, paths in enumerate(organ.stack.layers):
        names = {stack.name(layer, path): organ.stack.name(layer, path) for path in paths}
        stored = load_tensors(organ.checkpoint, names.values(), torch.float32)
        tensors |= {name: stored[theirs] for name, theirs in names.items()}
    model = assemble(replace(recipient, config=with_layers(recipient.config, organ.types)), tensors, torch.float32)
    model.requires_grad_(False)
    model.get_submodule(stack.home).requires_grad_(True)
    return model
