"""A recipient with organs as a value: which layer comes from where, what its config says, where every tensor of a layer lies.

Nothing is read but headers, and nothing is written: `write_insertion` makes a checkpoint of it, and whoever has the models in
memory can move their layers by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transplant_ray.errors import IncompatibleModels, OrganError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.organ.folder import Organ
from transplant_ray.organ.settings import (
    LayerType,
    depends_on_index,
    differing_settings,
    layer_settings,
    layer_types,
    with_layers,
)
from transplant_ray.organ.stack import Stack, read_stack
from transplant_ray.organ.vocabulary import VocabularyChoice, compare_vocabularies, read_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Mode = Literal["insert", "replace"]
MODES: tuple[Mode, ...] = ("insert", "replace")
APART: Mapping[Mode, str] = {
    "insert": "Which of two comes first? Put one in, and then the other into what comes out.",
    "replace": "Choose stretches apart.",
}
"""What to do where two organs are to have one place."""


@dataclass(frozen=True)
class Placement:
    organ: Organ
    at: int
    """A layer of the recipient as it is before anything is put in, counted from 0: the organ comes before it, or takes its place
    and that of those after it. The number of layers is the end."""


@dataclass(frozen=True)
class Layer:
    """Where a layer of the new model comes from."""

    organ: int | None
    """Which of the placements; None for the recipient."""
    index: int
    """Its number there."""


@dataclass(frozen=True)
class Insertion:
    recipient: Checkpoint
    stack: Stack
    """The recipient's."""
    placements: tuple[Placement, ...]
    """In order of position, however they were given."""
    mode: Mode
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]

    @property
    def types(self) -> tuple[LayerType, ...]:
        own = layer_types(self.recipient.config)
        return tuple(
            own[each.index] if each.organ is None else self.placements[each.organ].organ.types[each.index] for each in self.layers
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the new model's config says otherwise than the recipient's."""
        return layer_settings(self.recipient.config, self.types)

    @property
    def config(self) -> PretrainedConfig:
        return with_layers(self.recipient.config, self.types)

    def tensors(self) -> Iterator[tuple[str, Checkpoint, str]]:
        """Of every tensor of every layer: its name in the new checkpoint, and the checkpoint and name that it comes from.

        All other tensors are the recipient's, under their own names.
        """
        for place, layer in enumerate(self.layers):
            checkpoint, stack = self._home(layer)
            for path in stack.layers[layer.index]:
                yield self.stack.name(place, path), checkpoint, stack.name(layer.index, path)

    def _home(self, layer: Layer) -> tuple[Checkpoint, Stack]:
        if layer.organ is None:
            return self.recipient, self.stack
        organ = self.placements[layer.organ].organ
        return organ.checkpoint, organ.stack


def plan_insertion(
    recipient: Checkpoint, placements: Sequence[Placement], mode: Mode = "insert", vocabulary: VocabularyChoice = "refuse"
) -> Insertion:
    """Hold organs against the recipient field by field, and say what comes of it.

    IncompatibleModels with every field that differs; OrganError for a position that an organ cannot have.
    """
    stack = read_stack(recipient)
    ordered = tuple(sorted(placements, key=lambda placement: placement.at))
    warnings = (*check_compatible(recipient, ordered, vocabulary), *_other_dtypes(recipient, stack, ordered))
    layers = _layers(len(stack.layers), ordered, mode)
    insertion = Insertion(recipient, stack, ordered, mode, layers, warnings)
    _check_indices(insertion)
    return insertion


def check_compatible(recipient: Checkpoint, placements: Sequence[Placement], vocabulary: VocabularyChoice) -> tuple[str, ...]:
    """What is only warned of; IncompatibleModels, with every field that differs, for the rest."""
    ours, warnings = read_vocabulary(recipient), []
    for organ in {placement.organ.manifest.id: placement.organ for placement in placements}.values():
        source = organ.manifest.source.model
        differing = differing_settings(organ.checkpoint.config, recipient.config)
        other, unknown = compare_vocabularies(organ.manifest.vocabulary, ours)
        if other and vocabulary == "refuse":
            differing.append(f"{other}; --vocabulary warn puts it in all the same, though it has only seen its own embedding")
        elif other:
            warnings.append(f"{other}; the organ has only seen the embedding of {source}")
        if unknown:
            warnings.append(unknown)
        if differing:
            lines = "\n".join(f"  {line}" for line in differing)
            raise IncompatibleModels(
                f"organ {organ.manifest.id} of {source} does not fit {recipient.model}:\n{lines}\n"
                "Choose a recipient of the family, shape and positions that the organ was cut out of."
            )
    return tuple(dict.fromkeys(warnings))


def _other_dtypes(recipient: Checkpoint, stack: Stack, placements: Sequence[Placement]) -> tuple[str, ...]:
    ours = recipient.tensors[stack.name(0, stack.layers[0][0])].dtype
    organs = [placement.organ for placement in placements]
    theirs = {organ.checkpoint.tensors[organ.stack.name(0, organ.stack.layers[0][0])].dtype for organ in organs}
    return tuple(f"the organ is stored as {dtype} and takes the recipient's {ours}" for dtype in sorted(theirs - {ours}))


def _layers(num_layers: int, placements: Sequence[Placement], mode: Mode) -> tuple[Layer, ...]:
    own: list[Layer] = []
    put: dict[int, list[Layer]] = {}
    free = 0  # the first layer of the recipient that the next organ may come before, or take the place of
    for number, placement in enumerate(placements):
        length = placement.organ.num_layers
        _check_position(placement, num_layers, mode, free)
        put[placement.at] = [Layer(number, index) for index in range(length)]
        free = placement.at + (1 if mode == "insert" else length)
    gone = {place.at + i for place in placements for i in range(place.organ.num_layers)} if mode == "replace" else set()
    for index in range(num_layers + 1):
        own += put.get(index, [])
        own += [Layer(None, index)] if index < num_layers and index not in gone else []
    return tuple(own)


def _check_position(placement: Placement, num_layers: int, mode: Mode, free: int) -> None:
    length, at = placement.organ.num_layers, placement.at
    last = num_layers if mode == "insert" else num_layers - length
    if not 0 <= at <= last:
        reach = f"expected 0 to {last}" if last >= 0 else "it does not fit anywhere"
        raise OrganError(
            f"position {at}: the recipient has {num_layers} layers, counted from 0, and the organ {length}; to {mode} it, {reach}."
        )
    if at < free:
        raise OrganError(f"position {at}: another organ is there already. {APART[mode]}")


def _check_indices(insertion: Insertion) -> None:
    """Layers that compute by their own index have to keep it."""
    switch = depends_on_index(insertion.recipient.config)
    if switch is None:
        return
    for place, layer in enumerate(insertion.layers):
        organ = None if layer.organ is None else insertion.placements[layer.organ].organ.manifest
        before = layer.index + (organ.source.first if organ else 0)
        if before != place:
            raise IncompatibleModels(
                f"{insertion.recipient.model}: with `{switch}` a layer computes by its own index, and layer {before} would become "
                f"{place}. Replace layers by others of the same index."
            )
