"""Nodes, a pair and a calm sweep on them: what every sweep that is disturbed is held against."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from chaos.machines import Machines, machines, sweep
from integration.helpers import Place, read_results, related_pair
from mlflow import MlflowClient

RESOURCES = {
    "gpus_per_model": 1,
    "evaluators": "auto",
    "batch_size": 64,
    "shard_size": 8,
    "labels": {"source": {"role": "source"}, "target": {"role": "target"}},
}


@dataclass(frozen=True)
class Scene:
    """Where sweeps are disturbed, and what comes out where nobody does so."""

    machines: Machines
    template: Place
    calm: pd.DataFrame

    def place(self, folder: Path) -> Place:
        database = shutil.copy(self.template.path / "empty.db", folder / "mlflow.db")
        return self.template.copy(folder, f"sqlite:///{database}")


def recipe_for(place: Place, address: str) -> Path:
    grid = {"k": [1, 4, 10, 16], "kind": ["all"], "loss": True}
    return place.recipe(name="chaos", resources={**RESOURCES, "address": address}, sweep=grid)


@pytest.fixture(scope="session", autouse=True)
def _own_ray() -> Iterator[None]:
    """Whatever this process was told of another Ray is not for the sweeps."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("calm")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/empty.db").search_experiments()
    place = Place(folder, f"sqlite:///{folder}/mlflow.db")
    shutil.copy(folder / "empty.db", folder / "mlflow.db")
    related_pair(folder)
    with machines() as nodes:
        with sweep(recipe_for(place, nodes.address)) as running:
            assert running.wait() == 0, running.said
        yield Scene(nodes, place, read_results(folder / "runs" / "chaos"))
