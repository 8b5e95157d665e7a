"""A small training of an organ, and text for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stacks import Pair
from tiny import VOCABULARY, tiny_tokenizer

from transplant_ray.organ.pack import Pack, pack_text, training_cut
from transplant_ray.organ.text import Passage
from transplant_ray.organ.training import Training
from transplant_ray.organ.wrapper import load_wrapper
from transplant_ray.recipe import TrainingSpec


def sums(number: int, seed: int = 0) -> Iterator[str]:
    """Documents that can be learnt from."""
    draw = random.Random(seed)
    for _ in range(number):
        pairs = [(draw.randrange(30), draw.randrange(30)) for _ in range(4)]
        yield " ".join(f"{a}+{b}={a + b}." for a, b in pairs)


def training_spec(**changes: Any) -> TrainingSpec:
    settings = {"context": 16, "steps": 12, "batch": 4, "lr": 1e-2, "held_out": 0.1, "report_every": 5, "dtype": "float32"}
    return TrainingSpec.model_validate({"data": ["x"], **settings, **changes})


def make_pack(folder: Path, spec: TrainingSpec) -> Pack:
    return pack_text(map(Passage, sums(60)), tiny_tokenizer(), VOCABULARY, training_cut(spec), folder)


def begin(pair: Pair, folder: Path, **changes: Any) -> Training:
    spec = training_spec(**changes)
    return Training(load_wrapper(pair.recipient, pair.organ), make_pack(folder, spec), spec)


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.parameters.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
