"""Organs trained by the real Ray Train: calm, with a worker killed, with the driver killed, and by two workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray
import torch
from integration.helpers import Place, run_main
from mlflow import MlflowClient
from ray.train import get_context
from safetensors.torch import load_file
from stacks import load, make_pair, save_model
from torch import nn
from trainings import make_pack, sums, training_spec

from transplant_ray.distributed.facts import Fact, StepsDone
from transplant_ray.distributed.training import TrainingJob, run_training
from transplant_ray.errors import NumericsError
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.learners import OrganLearner
from transplant_ray.pipeline.organ_training import Trained, train
from transplant_ray.pipeline.organs import insert
from transplant_ray.recipe import TrainingSpec, WorkerSpec

SETTINGS = {
    "context": "16", "steps": "200", "batch": "4", "lr": "0.003", "held_out": "0.1", "report_every": "1", "checkpoint_every": "20",
}  # fmt: skip
SECRET = "7+9=16"
"""In the text that is trained on."""


@dataclass
class Calm:
    folder: Path
    """With `model`, `text.jsonl` and the organ that came of them."""
    said: str
    uri: str

    @property
    def organ(self) -> bytes:
        return (self.folder / "organ" / "organ.safetensors").read_bytes()

    @property
    def spec(self) -> TrainingSpec:
        return TrainingSpec.model_validate({"data": [str(self.folder / "text.jsonl")], **SETTINGS})

    def train(self, out: Path, workers: WorkerSpec, watch: Watcher | None = None, **changes: int) -> Trained:
        spec = self.spec.model_copy(update=changes)
        return train(str(self.folder / "model"), spec, out, layers="1-3", workers=workers, watch=watch)

    def command(self, out: Path, *options: str) -> list[str]:
        options = (*options, "--model", str(self.folder / "model"), "--data", str(self.folder / "text.jsonl"), "--layers", "1-3")
        settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        return ["organ", "train", *options, "--out", str(out), "--cpus", "1", *settings]


@dataclass
class Watcher:
    """Does something once the training has come to a step."""

    step: int
    act: Callable[[], None]
    notes: list[str] = field(default_factory=list)
    heard: list[StepsDone] = field(default_factory=list)

    def stage(self, name: str, total: int, unit: str = "examples") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, StepsDone):
            if all(before.step < self.step for before in self.heard) and fact.step >= self.step:
                self.act()
            self.heard.append(fact)


@pytest.fixture(scope="module")
def calm(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Calm:  # noqa: ARG001
    """Nobody is killed; through the command line."""
    folder = tmp_path_factory.mktemp("training")
    save_model(folder / "model")
    texts = [*sums(60), SECRET]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = Calm(folder, "", template.uri)
    finished = run_main(*made.command(folder / "organ", "--tracking", template.uri))
    assert finished.code == 0, finished.err
    return Calm(folder, finished.out, template.uri)


def test_it_is_an_organ_like_any_other_and_says_how_it_was_trained(calm: Calm, tmp_path: Path) -> None:
    organ = open_organ(calm.folder / "organ")
    record = organ.manifest.training
    assert record is not None
    assert (record["steps"], record["tokens"]) == (200, 200 * 4 * 16)
    first, last = record["held_out"]
    assert last["perplexity"] < first["perplexity"] / 1.3
    assert insert(str(calm.folder / "model"), [(calm.folder / "organ", 1)], tmp_path / "out").warnings == ()
    assert load(tmp_path / "out").config.num_hidden_layers == 9
    assert "perplexity on" in calm.said


def test_the_text_is_nowhere_in_it_and_nothing_lies_about(calm: Calm) -> None:
    for path in (calm.folder / "organ").rglob("*"):
        assert SECRET.encode() not in path.read_bytes()
    assert sorted(path.name for path in calm.folder.iterdir()) == ["model", "organ", "text.jsonl"]


def test_mlflow_has_the_curves(calm: Calm) -> None:
    client = MlflowClient(tracking_uri=calm.uri)
    experiment = client.get_experiment_by_name("organs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "params.steps = '200'")  # others train into the same database
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in losses] == list(range(1, 201))
    held_out = client.get_metric_history(run.info.run_id, "held_out_perplexity")
    assert [metric.step for metric in held_out] == list(range(0, 201, 20))
    record = json.loads(Path(client.download_artifacts(run.info.run_id, "training.json")).read_text())
    assert record == open_organ(calm.folder / "organ").manifest.training


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_no_bit(calm: Calm, tmp_path: Path) -> None:
    watcher = Watcher(random.randint(25, 120), lambda: [process.kill() for process in train_workers()] and None)
    trained = calm.train(tmp_path / "organ", WorkerSpec(cpus=1), watcher)
    assert any("a worker died" in note for note in watcher.notes)
    assert (tmp_path / "organ" / "organ.safetensors").read_bytes() == calm.organ
    assert [fact.step for fact in watcher.heard] == [point.step for point in trained.curve] == list(range(201))


def train_workers() -> list[psutil.Process]:
    """Those of the Ray that this process has started."""
    return [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(process.cmdline())]


DRIVER = """
import json, os, signal, sys
from pathlib import Path
from transplant_ray.distributed import training
from transplant_ray.distributed.facts import StepsDone
from transplant_ray.pipeline.organ_training import train
from transplant_ray.pipeline.watch import Silent
from transplant_ray.recipe import TrainingSpec, WorkerSpec

class Killer(Silent):
    def hear(self, fact):
        if isinstance(fact, StepsDone) and fact.step >= asked["step"]:
            os.kill(os.getpid(), signal.SIGKILL)

asked = json.loads(sys.argv[1])
training.POLL_SECONDS = 0.02  # so that it is not long past that step
train(asked["model"], TrainingSpec.model_validate(asked["spec"]), Path(asked["out"]), layers="1-3",
      workers=WorkerSpec(cpus=1, address=asked["address"]), watch=Killer())
"""
"""Trains, and kills itself once it hears of a step."""


@pytest.mark.slow
@pytest.mark.parametrize("pause", [20, 200], ids=["after-a-checkpoint", "before-the-first"])
def test_a_driver_that_is_killed_at_any_step_goes_on_and_changes_no_bit(calm: Calm, tmp_path: Path, pause: int) -> None:
    seed = int(os.environ.get("KILL_SEED", random.randrange(10_000)))
    step = random.Random(seed).randint(*((21, 170) if pause == 20 else (1, 80)))
    print(f"killed at step {step}: KILL_SEED={seed}")
    spec = calm.spec.model_copy(update={"checkpoint_every": pause})
    asked = {
        "model": str(calm.folder / "model"), "spec": spec.model_dump(mode="json"), "out": str(tmp_path / "organ"), "step": step,
        "address": ray.get_runtime_context().gcs_address,
    }  # fmt: skip
    process = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(asked)], timeout=600, check=False)
    checkpoints = list(tmp_path.glob(".organ.training/attempt-0/checkpoint_*/progress.json"))
    assert process.returncode == -signal.SIGKILL
    assert bool(checkpoints) == (pause == 20)
    assert not (tmp_path / "organ").exists()
    watcher = Watcher(0, lambda: None)
    calm.train(tmp_path / "organ", WorkerSpec(cpus=1), watcher, checkpoint_every=pause)
    assert pause == 200 or any(note.startswith("goes on after step ") for note in watcher.notes)
    assert (tmp_path / "organ" / "organ.safetensors").read_bytes() == calm.organ


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 1], ids=["whole", "in-parts"])
def test_two_workers_come_to_the_same_but_for_rounding(calm: Calm, tmp_path: Path, micro_batch: int) -> None:
    """Each reads two contexts a step: at once, or one after the other with one exchange of gradients."""
    calm.train(tmp_path / "organ", WorkerSpec(num=2, cpus=1), micro_batch=micro_batch)
    ours, theirs = (load_file(folder / "organ" / "organ.safetensors") for folder in (tmp_path, calm.folder))
    start = load_file(calm.folder / "model" / "model.safetensors")
    for name, weight in theirs.items():
        layer, path = name.removeprefix("model.layers.").split(".", 1)
        before = start[f"model.layers.{int(layer) + 1}.{path}"]
        moved = (weight - before).norm()
        assert moved > 0
        assert (ours[name] - weight).norm() < 0.02 * moved, name
    assert not torch.equal(ours["model.layers.0.mlp.up_proj.weight"], start["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.slow
@pytest.mark.timeout(600, func_only=True)
@pytest.mark.parametrize("max_failures", [0, 3])
def test_one_of_two_workers_that_fails_ends_the_training_with_its_error(cluster: None, tmp_path: Path, max_failures: int) -> None:  # noqa: ARG001
    """The other one waits for it in the exchange of gradients, for as long as it is let."""
    pair, spec = make_pair(tmp_path), training_spec(steps=50, micro_batch=2)
    job = TrainingJob(
        failing(OrganLearner(pair.recipient, pair.organ), rank=1, after=12),
        spec,
        make_pack(tmp_path / "pack", spec).folder,
        tmp_path / "attempts",
        None,
        num_threads=1,
    )
    notes: list[str] = []
    with pytest.raises(NumericsError, match="rank 1 has had enough"):
        run_training(job, WorkerSpec(num=2, cpus=1, max_failures=max_failures), lambda _: None, notes.append)
    assert notes == []


def failing(learner: OrganLearner, rank: int, after: int) -> OrganLearner:
    """On one rank, at a forward pass. The class is in here so that it travels to the workers as it stands."""
    passes = []

    def count(*_: object) -> None:
        passes.append(1)
        if len(passes) > after:
            raise NumericsError(f"rank {rank} has had enough")

    @dataclass(frozen=True)
    class Failing(OrganLearner):
        def load(self, seed: int) -> nn.Module:
            model = super().load(seed)
            if get_context().get_world_rank() == rank:
                model.register_forward_pre_hook(count)
            return model

    return Failing(learner.recipient, learner.organ)
