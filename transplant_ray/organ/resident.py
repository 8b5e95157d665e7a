"""A recipient and organs whose weights are in memory once, and any model that can be made of their layers.

Such a model is what `transformers` makes of the insertion's own config, so that masks, types of layers and places in the cache are
those of the checkpoint that `write_insertion` would write; its weights are the resident ones, and not copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.header import DTYPES
from transplant_ray.models.loading import assemble, load_tensors
from transplant_ray.organ.insert import stored_dtype
from transplant_ray.organ.insertion import Insertion
from transplant_ray.organ.stack import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Home = tuple[str, str, torch.dtype | None]
"""Where a tensor comes from: the model, its name there, and the dtype that the new checkpoint would store it in."""


@dataclass
class Resident:
    """What one process holds; a tensor is read when the first model needs it."""

    dtype: torch.dtype
    """Of the arithmetic."""
    device: str = "cpu"
    held: dict[Home, torch.Tensor] = field(default_factory=dict)

    def model(self, insertion: Insertion) -> PreTrainedModel:
        """In evaluation mode, without gradients. Equal to the written checkpoint, loaded in this dtype, bit for bit."""
        made = assemble(replace(insertion.recipient, config=insertion.config), self.read(insertion), self.dtype, self.device)
        return made.eval().requires_grad_(False)

    def read(self, insertion: Insertion) -> dict[str, torch.Tensor]:
        """Weights by their names in the model; from the disk what is not held yet. CheckpointError where a file is not there."""
        recipient = insertion.recipient
        outside = [name for name in recipient.tensors if split_name(name, insertion.stack.prefix) is None]
        tensors = {name: self._tensor(recipient, name, None) for name in outside}
        for name, origin, stored in insertion.tensors():
            tensors[name] = self._tensor(origin, stored, None if origin is recipient else stored_dtype(insertion, name))
        return tensors

    def _tensor(self, origin: Checkpoint, name: str, stored: str | None) -> torch.Tensor:
        """Through the dtype in which the recipient's file would hold it: there an organ's numbers are rounded."""
        rounded = None if stored is None else DTYPES[stored]
        home = (str(origin.folder or (origin.model, origin.revision)), name, rounded)
        if home not in self.held:
            self.held[home] = load_tensors(origin, [name], rounded)[name].to(self.device, self.dtype)
        return self.held[home]
