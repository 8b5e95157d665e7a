"""Keys and values of a batch whose rows come and go.

Shapes: B rows, H heads, W columns so far, D head width. Rows end at the last column; what is left of a shorter row is padding.
Rows that join are read straight into their place, so that nothing is held twice, but a layer at a time while its room is made anew.
Columns are written into spare room, so that a decode step copies nothing; sliding-window layers keep all columns too, for their
mask says what they may see.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers.cache_utils import Cache, DynamicLayer

SPARE_COLUMNS = 32
"""Room that is made at once: an allocation every so many steps."""


class _Layer(DynamicLayer):
    """Keys and values of one layer; `keys` and `values` are views of what is filled."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int = 0, width: int = 0) -> None:
        """Room for the first rows, which is taken when they are written: only then is it known of what kind they are."""
        super().__init__()
        self.rows_to_come, self.width_to_come = rows, width
        self.width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._resize(key_states.shape[0], 0, key_states[:, :, :0], value_states[:, :, :0], spare=key_states.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        end = self.width + num_new
        if end > self._buffers[0].shape[2]:
            self._resize(self.keys.shape[0], self.width, self.keys, self.values, spare=num_new + SPARE_COLUMNS)
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
        self._resize(len(rows), keys.shape[2], keys, values)

    def make_room(self, rows: int, width: int) -> None:
        """For so many rows more, at the end; all rows end at column `width` from here on."""
        self._resize(self.keys.shape[0] + rows, width, self.keys, self.values)

    def write(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The rows from `first` on."""
        if not self.is_initialized:
            self._resize(self.rows_to_come, self.width_to_come, keys[:0], values[:0])
        for whole, part in zip((self.keys, self.values), (keys, values), strict=True):
            rows = whole[first : first + part.shape[0]]
            padding = self.width - part.shape[2]
            rows[:, :, :padding] = 0  # it is masked, but must be finite
            rows[:, :, padding:] = part

    def _resize(self, rows: int, width: int, keys: torch.Tensor, values: torch.Tensor, spare: int = SPARE_COLUMNS) -> None:
        """New room, whose first rows are these."""
        buffers = [part.new_empty(rows, part.shape[1], width + spare, part.shape[3]) for part in (keys, values)]
        self._buffers = (buffers[0], buffers[1])
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(width)
        self.write(0, keys, values)

    def _show(self, width: int) -> None:
        self.width = width
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)


class _SlotLayer(DynamicLayer):
    """Where rows that join leave their keys and values; of the others they see nothing."""

    def __init__(self, layer: _Layer, first: int) -> None:
        super().__init__()
        self.layer, self.first = layer, first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layer.write(self.first, key_states, value_states)
        return key_states, value_states


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

    def make_room(self, rows: int, width: int) -> None:
        """For so many rows more, at the end; all rows end at column `width` from here on. Each is then filled through a `slot`."""
        self.layer_class_to_replicate = partial(_Layer, rows, width)
        for layer in self.layers:
            layer.make_room(rows, width)

    def slot(self, first: int) -> Cache:
        """The cache to read prompts with whose rows are the rows from `first` on of this one. For one forward pass."""

        def next_layer() -> _SlotLayer:
            index = len(slot.layers)
            if index == len(self.layers):
                self.layers.append(self.layer_class_to_replicate())
            return _SlotLayer(self.layers[index], first)

        slot = Cache(layer_class_to_replicate=next_layer)
        return slot
