"""Keys and values of a batch whose rows come and go.

Shapes: B rows, H heads, W columns so far, D head width. Rows end at the last column; what is left of a shorter row is padding.
Columns are written into spare room, so that a decode step copies nothing; sliding-window layers keep all columns too, for their
mask says what they may see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

SPARE_COLUMNS = 32
"""Room that is made at once: an allocation every so many steps."""


class _Layer(DynamicLayer):
    """Keys and values of one layer; `keys` and `values` are views of what is filled."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._fill(key_states[:, :, :0], value_states[:, :, :0], room=key_states.shape[2])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.width + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._fill(self.keys, self.values, room=key_states.shape[2] + SPARE_COLUMNS)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.width : end] = new
        self._show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def take(self, rows: torch.Tensor, first: int) -> None:
        """Keep these rows, in this order, and the columns from `first` on."""
        rows = rows.to(self.device)
        keys, values = (part[:, :, first:].index_select(0, rows) for part in (self.keys, self.values))
        self._fill(keys, values, room=SPARE_COLUMNS)

    def join(self, parts: Sequence[_Layer]) -> None:
        """Become the rows of `parts`, one part after another."""
        width, narrowest = max(part.width for part in parts), min(part.width for part in parts)
        self.dtype, self.device = parts[0].dtype, parts[0].device
        sizes = [part.keys.shape[0] for part in parts]
        joined = []
        for name in ("keys", "values"):
            like: torch.Tensor = getattr(parts[0], name)
            whole = like.new_empty(sum(sizes), like.shape[1], width + SPARE_COLUMNS, like.shape[3])
            whole[:, :, : width - narrowest] = 0  # padding is masked, but must be finite
            for part, rows in zip(parts, torch.split(whole, sizes), strict=True):
                rows[:, :, width - part.width : width] = getattr(part, name)
            joined.append(whole)
        self._buffers = (joined[0], joined[1])
        self._show(width)
        self.is_initialized = True

    def _fill(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        buffers = []
        for part in (keys, values):
            buffer = part.new_empty(*part.shape[:2], part.shape[2] + room, part.shape[3])
            buffer[:, :, : part.shape[2]] = part
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._show(keys.shape[2])

    def _show(self, width: int) -> None:
        self.width = width
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)


class RowCache(Cache):
    """A key-value cache for `transformers` models."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def width(self) -> int:
        return int(self.get_seq_length())

    @property
    def num_bytes(self) -> int:
        """Of the columns that are filled."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in (layer.keys, layer.values))

    def take(self, rows: torch.Tensor, first: int) -> None:
        """Keep these rows, in this order, and the columns from `first` on."""
        for layer in self.layers:
            layer.take(rows, first)

    @classmethod
    def join(cls, parts: Sequence[RowCache]) -> RowCache:
        """One cache with the rows of all parts, one part after another."""
        joined = cls()
        for layers in zip(*(part.layers for part in parts), strict=True):
            layer = _Layer()
            layer.join(layers)
            joined.layers.append(layer)
        return joined
