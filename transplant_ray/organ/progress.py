"""Checkpoints of a training: how far it is, as files without a pickle.

weights.safetensors       what is trained, in float32
optimizer.safetensors     AdamW's moments
progress.json             the step, the curve so far, who trained, and the hashes of the two files
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from transplant_ray.errors import RunError
from transplant_ray.files import sha256_file, whole_file, write_json
from transplant_ray.organ.training import Point, Training

WEIGHTS, MOMENTS, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"


@dataclass(frozen=True)
class Crew:
    """Who trained. On a CPU their number decides in which order sums are taken, and so the last bits of the weights."""

    workers: int
    threads: int
    """Of each worker."""

    def __str__(self) -> str:
        return f"{self.workers} workers of {self.threads} threads"


@dataclass(frozen=True)
class Progress:
    folder: Path
    step: int
    curve: tuple[Point, ...]
    crew: Crew

    def weights(self) -> dict[str, torch.Tensor]:
        return _load(self.folder / WEIGHTS)

    def moments(self) -> dict[str, torch.Tensor]:
        return _load(self.folder / MOMENTS)

    def restore(self, training: Training) -> None:
        training.restore(self.step, self.weights(), self.moments(), list(self.curve))


def save_progress(training: Training, folder: Path) -> None:
    """Into a folder that is there. RunError where there is no room."""
    weights = {name: parameter.detach().contiguous() for name, parameter in training.parameters.items()}
    for name, tensors in ((WEIGHTS, weights), (MOMENTS, training.moments())):
        with whole_file(folder / name) as path:
            save_file(tensors, path)
    hashes = {name: sha256_file(folder / name) for name in (WEIGHTS, MOMENTS)}
    curve, crew = [point.to_json() for point in training.curve], Crew(training.rank.of, torch.get_num_threads())
    write_json(folder / PROGRESS, {"step": training.step, "curve": curve, "crew": asdict(crew), "files": hashes})


def read_progress(folder: Path) -> Progress | None:
    """None where the checkpoint is not whole: whoever wrote it was killed, or somebody changed it."""
    try:
        said = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        whole = all(sha256_file(folder / name) == said["files"][name] for name in (WEIGHTS, MOMENTS))
        curve, crew = tuple(Point(**point) for point in said["curve"]), Crew(**said["crew"])
        return Progress(folder, int(said["step"]), curve, crew) if whole else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def latest_progress(folders: Iterable[Path]) -> Progress | None:
    """The furthest of the checkpoints that are whole."""
    found = [progress for folder in folders if (progress := read_progress(folder)) is not None]
    return max(found, key=lambda progress: progress.step, default=None)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read any more ({error}). Run the training again.") from error
    return tensors
