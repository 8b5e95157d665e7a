"""The tiny pair of every deep family, written to disk once, and points of its coefficient space."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import DEEP_FAMILIES, tiny_model, tiny_tokenizer

from transplant_ray.graft.variant import Coefficient, Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

DrawVariant = Callable[[Comparison, int, str], Variant]


def write_pair(folder: Path, family: str, dtype: torch.dtype) -> Comparison:
    """Source and target with biases that matter: those of a new model are zero, and a lost one would go unseen."""
    for role, seed in (("source", 1), ("target", 2)):
        model = tiny_model(family, seed, dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / role)
        tiny_tokenizer().save_pretrained(folder / role)
    return compare(open_checkpoint(str(folder / "source")), open_checkpoint(str(folder / "target")))


@pytest.fixture(scope="session", params=DEEP_FAMILIES)
def comparison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_pair(tmp_path_factory.mktemp(request.param), request.param, torch.float32)


@pytest.fixture(scope="session")
def bfloat16_pair(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The same family, stored in bfloat16."""
    family: str = comparison.target.config.model_type
    return write_pair(tmp_path_factory.mktemp(f"{family}-bfloat16"), family, torch.bfloat16)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_pair(tmp_path_factory.mktemp("alone"), "llama", torch.float32)


@pytest.fixture(scope="session")
def draw_variant() -> DrawVariant:
    """A random variant over half of the modules: `hard` (coefficients 1), `alpha`, `channels` (0 or 1 each), or `mixed`."""

    def draw(comparison: Comparison, seed: int, what: str) -> Variant:
        rng = random.Random(seed)
        modules = rng.sample(comparison.modules, len(comparison.modules) // 2)

        def coefficient(num_channels: int) -> Coefficient:
            kind = rng.choice(("hard", "alpha", "channels")) if what == "mixed" else what
            if kind == "channels":
                return tuple(float(rng.random() < 0.5) for _ in range(num_channels))
            return 1.0 if kind == "hard" else rng.random()

        return Variant({module.name: coefficient(module.num_channels) for module in modules})

    return draw
