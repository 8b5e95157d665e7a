"""The grid of an organ sweep as a value: every model that is to be measured, what does not fit, and why.

Nothing is loaded. Two trials whose models consist of the same layers have one id, and are measured once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from transplant_ray.errors import IncompatibleModels, OrganError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.organ.folder import Organ
from transplant_ray.organ.insertion import Insertion, Layer, Mode, Placement, check_compatible, plan_insertion
from transplant_ray.organ.settings import depends_on_index
from transplant_ray.organ.stack import split_name
from transplant_ray.organ.vocabulary import VocabularyChoice
from transplant_ray.recipe import PlacesSpec

Role = Literal["recipient", "trial", "untrained", "alone"]
"""The baseline; what may win; the same layers untrained; an organ between embedding and head."""


@dataclass(frozen=True)
class Trial:
    role: Role
    insertion: Insertion
    organ: str | None = None
    """Its name in the recipe; of an untrained control, that of the organ whose layers they were."""
    mode: Mode | None = None
    at: int | None = None

    @cached_property
    def label(self) -> str:
        if self.role == "recipient":
            return "recipient"
        place = "alone" if self.at is None else f"{self.mode} {self.at}"
        return f"{self.organ} {place}" if self.role != "untrained" else f"{self.organ} untrained {place}"

    @cached_property
    def id(self) -> str:
        """By the layers that the model consists of, each by the content of the file that it comes from."""
        return hashlib.sha256(json.dumps([self._origin(layer) for layer in self.insertion.layers]).encode()).hexdigest()[:10]

    @property
    def num_put(self) -> int:
        """Layers that are not the recipient's."""
        return sum(layer.organ is not None for layer in self.insertion.layers)

    @cached_property
    def num_parameters(self) -> int:
        """Of the whole model, each tensor once."""
        insertion = self.insertion
        own = insertion.recipient.tensors
        outside = sum(prod(info.shape) for name, info in own.items() if split_name(name, insertion.stack.prefix) is None)
        return outside + sum(prod(origin.tensors[stored].shape) for _, origin, stored in insertion.tensors())

    def _origin(self, layer: Layer) -> tuple[str, int, str | None]:
        if layer.organ is None:
            return "recipient", layer.index, None
        organ = self.insertion.placements[layer.organ].organ
        return organ.manifest.weights, layer.index, organ.types[layer.index]


@dataclass(frozen=True)
class Misfit:
    """A point of the grid that cannot be."""

    organ: str
    mode: Mode
    at: int
    reason: str


@dataclass(frozen=True)
class Grid:
    trials: tuple[Trial, ...]
    """The recipient first, then the points in their order, then the controls."""
    misfits: tuple[Misfit, ...] = ()
    warnings: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    """Organ → why its layers cannot be measured untrained, or it alone."""

    @property
    def recipient(self) -> Trial:
        return self.trials[0]

    @property
    def num_models(self) -> int:
        """Different ones."""
        return len({trial.id for trial in self.trials})

    def trial(self, label: str) -> Trial:
        return next(trial for trial in self.trials if trial.label == label)

    def of(self, role: Role) -> list[Trial]:
        return [trial for trial in self.trials if trial.role == role]

    def untrained(self, trial: Trial) -> Trial | None:
        """The control of a trial: the same layers untrained, at the same place."""
        place = (trial.organ, trial.mode, trial.at)
        return next((each for each in self.of("untrained") if (each.organ, each.mode, each.at) == place), None)


def plan_grid(
    recipient: Checkpoint,
    organs: Mapping[str, Organ],
    spec: PlacesSpec,
    *,
    untrained: Mapping[str, Organ | str],
    alone: bool = True,
    vocabulary: VocabularyChoice = "refuse",
) -> Grid:
    """Every organ at every position in every mode, with its controls.

    `untrained` has of each organ its layers as they were before, or why nobody knows. IncompatibleModels where an organ does not
    fit the recipient; OrganError where a position, or an organ in a mode, fits nowhere: single points that do not are told.
    """
    bare = plan_insertion(recipient, [])
    warnings = [f"organ {name}: {told}" for name, organ in organs.items() for told in _warnings(recipient, name, organ, vocabulary)]
    trials, misfits = _points(recipient, organs, spec, len(bare.stack.layers), vocabulary)
    _check_fits(trials, misfits, spec)
    without = {name: why for name, why in untrained.items() if isinstance(why, str)}
    controls = list(_untrained(trials, untrained, vocabulary))
    if alone and depends_on_index(recipient.config):
        without |= {
            name: f"`{depends_on_index(recipient.config)}`: alone its layers would compute by another index" for name in organs
        }
    elif alone:
        controls += _alone(recipient, organs, vocabulary)
    return Grid((Trial("recipient", bare), *trials, *controls), tuple(misfits), tuple(dict.fromkeys(warnings)), without)


def _warnings(recipient: Checkpoint, name: str, organ: Organ, vocabulary: VocabularyChoice) -> Sequence[str]:
    try:
        return check_compatible(recipient, [Placement(organ, 0)], vocabulary)
    except IncompatibleModels as error:
        raise IncompatibleModels(f"`organs.{name}`: {error}") from None


def _points(
    recipient: Checkpoint, organs: Mapping[str, Organ], spec: PlacesSpec, num_layers: int, vocabulary: VocabularyChoice
) -> tuple[list[Trial], list[Misfit]]:
    trials: list[Trial] = []
    misfits: list[Misfit] = []
    for name, organ in organs.items():
        for mode in spec.modes:
            for at in _positions(spec, mode, num_layers, organ.num_layers):
                try:
                    insertion = plan_insertion(recipient, [Placement(organ, at)], mode, vocabulary)
                except (OrganError, IncompatibleModels) as error:
                    misfits.append(Misfit(name, mode, at, str(error)))
                else:
                    trials.append(Trial("trial", insertion, name, mode, at))
    return trials, misfits


def _positions(spec: PlacesSpec, mode: Mode, num_layers: int, length: int) -> Sequence[int]:
    """With `all`, position 0 is tried even where an organ is too long: the error says so."""
    if spec.positions != "all":
        return spec.positions
    return range(num_layers + 1 if mode == "insert" else max(1, num_layers - length + 1))


def _check_fits(trials: Sequence[Trial], misfits: Sequence[Misfit], spec: PlacesSpec) -> None:
    for at in () if spec.positions == "all" else spec.positions:
        if all(trial.at != at for trial in trials):
            reason = next(misfit.reason for misfit in misfits if misfit.at == at)
            raise OrganError(f"`sweep.positions`: {reason}")
    fits = {(trial.organ, trial.mode) for trial in trials}
    for misfit in misfits:
        if (misfit.organ, misfit.mode) not in fits:
            raise OrganError(
                f"`sweep.modes`: organ {misfit.organ} can be put nowhere with `{misfit.mode}`: {misfit.reason} Leave out that "
                "mode, or the organ."
            )


def _untrained(trials: Sequence[Trial], untrained: Mapping[str, Organ | str], vocabulary: VocabularyChoice) -> Iterator[Trial]:
    for trial in trials:
        organ = untrained.get(str(trial.organ))
        if isinstance(organ, Organ) and trial.at is not None and trial.mode is not None:
            insertion = plan_insertion(trial.insertion.recipient, [Placement(organ, trial.at)], trial.mode, vocabulary)
            yield replace(trial, role="untrained", insertion=insertion)


def _alone(recipient: Checkpoint, organs: Mapping[str, Organ], vocabulary: VocabularyChoice) -> Iterator[Trial]:
    """As an organ is trained: nothing but itself between the recipient's embedding and head."""
    for name, organ in organs.items():
        insertion = plan_insertion(recipient, [Placement(organ, 0)], "insert", vocabulary)
        layers = tuple(Layer(0, index) for index in range(organ.num_layers))
        yield Trial("alone", replace(insertion, layers=layers), name)
