"""`organ train` as a whole, with a loop in this process in the place of Ray Train: what is written, kept, gone on with, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from stacks import contents, save_model
from trainings import sums

from transplant_ray.distributed.cluster import JOB_CONFIG
from transplant_ray.distributed.training import TrainingJob, find_progress
from transplant_ray.errors import (
    DataError,
    IncompatibleModels,
    NumericsError,
    OrganError,
    RecipeError,
    RunError,
    TransplantError,
)
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.pack import Pack
from transplant_ray.organ.progress import Progress, read_progress, save_progress
from transplant_ray.organ.training import Point, Training
from transplant_ray.pipeline import organ_training as module
from transplant_ray.pipeline.organ_training import Trained, describe_training, settle, train
from transplant_ray.pipeline.organs import extract
from transplant_ray.pipeline.watch import Silent
from transplant_ray.recipe import TrackingSpec, TrainingSpec, WorkerSpec

SETTINGS = {"context": 16, "steps": 12, "batch": 4, "lr": 1e-2, "held_out": 0.2, "checkpoint_every": 4}


class Workers:
    """In Ray Train's place; `stop` ends the training as a signal does once its checkpoint is written."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.began: list[int] = []
        self.error: TransplantError | None = None

    def run(self, job: TrainingJob, _: WorkerSpec, on_point: Callable[[Point], None], __: Callable[[str], None]) -> Progress:
        training = Training(job.learner.load(job.spec.seed), Pack.open(job.pack), job.spec)
        if job.start is not None and (progress := read_progress(job.start)) is not None:
            progress.restore(training)
        self.began.append(training.step)
        for point in training.run():
            on_point(point)
            if self.error is not None:
                raise self.error
            if training.is_due(point):
                folder = job.folder / f"attempt-{len(self.began)}" / f"checkpoint_{point.step:04}"
                folder.mkdir(parents=True)
                save_progress(training, folder)
                if point.step == self.stop:
                    raise KeyboardInterrupt
        last = find_progress(job.folder)
        assert last is not None
        return last


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(module, "connect", lambda _: nullcontext())
    monkeypatch.setattr(module, "share_out", lambda _: 1)
    monkeypatch.setattr(module, "run_training", workers.run)
    return workers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With the text."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sums(60)))
    return folder


def run(model: Path, place: Path, out: str = "organ", settings: dict[str, Any] | None = None, **options: Any) -> Trained:
    spec = TrainingSpec.model_validate({"data": [str(place / "text.jsonl")], **SETTINGS, **(settings or {})})
    return train(str(model), spec, place / out, **({"layers": "1-3"} | options if "organ" not in options else options))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_layers_of_a_model_become_a_trained_organ_and_nothing_else_stays(model: Path, place: Path) -> None:
    trained = run(model, place)
    before = extract(str(model), "1-3", place / "before")
    organ = open_organ(place / "organ")
    assert names(place) == ["before", "organ", "text.jsonl"]
    assert organ.manifest.model_copy(update={"training": None, "weights": before.manifest.weights}) == before.manifest
    assert contents(place / "organ")["organ.safetensors"] != contents(place / "before")["organ.safetensors"]
    record = organ.manifest.training
    assert record is not None
    assert record["before"] == before.manifest.fingerprint
    assert record["steps"] == 12
    assert [point["step"] for point in record["held_out"]] == [0, 12]
    assert [point.step for point in trained.curve] == [0, 4, 8, 10, 12]
    assert describe_training(trained)[0].startswith("trained 12 steps on 768 tokens")


def test_what_mlflow_refused_of_a_training_is_told(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Mock(refused=("metrics of step 4: too long",))
    monkeypatch.setattr(module, "tracked_training", lambda *_: nullcontext(tracker))
    assert run(model, place, tracking=TrackingSpec()).refused == tracker.refused
    assert tracker.log_record.called


def test_an_organ_that_was_cut_out_before_gives_the_same_weights(model: Path, place: Path) -> None:
    run(model, place)
    extract(str(model), "1-3", place / "cut")
    run(model, place, "other", organ=place / "cut")
    assert contents(place / "organ")["organ.safetensors"] == contents(place / "other")["organ.safetensors"]


def test_a_trained_organ_can_be_trained_on_and_says_both(model: Path, place: Path) -> None:
    first = run(model, place).organ.manifest
    second = run(model, place, "more", organ=place / "organ").organ.manifest
    assert second.training is not None
    assert (second.training["before"], second.training["earlier"]) == (first.fingerprint, first.training)


def test_nothing_of_the_text_is_in_the_organ(model: Path, place: Path) -> None:
    run(model, place)
    texts = [text.encode() for text in sums(60)]
    for content in contents(place / "organ").values():
        assert not any(text in content or text.split(b" ")[0] in content for text in texts)
        assert str(place).encode() not in content


def test_stopped_it_goes_on_and_ends_with_the_same(model: Path, place: Path, workers: Workers) -> None:
    run(model, place, "calm")
    workers.stop = 8
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    assert names(place) == [".organ.training", "calm", "text.jsonl"]
    workers.stop = None
    again = run(model, place)
    assert workers.began == [0, 0, 8]
    assert contents(place / "organ") == contents(place / "calm")
    assert [point.step for point in again.curve] == [0, 4, 8, 10, 12]
    assert names(place) == ["calm", "organ", "text.jsonl"]


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("more", "gpus", "warned"), [(0, 0, False), (1, 0, True), (1, 1, False)])
def test_another_number_of_threads_is_said_for_it_decides_the_last_bits(
    model: Path, place: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, more: int, gpus: int, warned: bool
) -> None:
    threads, crew, notes = torch.get_num_threads(), WorkerSpec(gpus=gpus), Notes()
    workers.stop = 8
    with pytest.raises(KeyboardInterrupt):
        run(model, place, workers=crew)
    monkeypatch.setattr(module, "share_out", lambda _: threads + more)
    workers.stop = None
    run(model, place, workers=crew, watch=notes)
    warning = f"goes on with 1 workers of {threads + 1} threads, it came so far with 1 workers of {threads} threads"
    assert [warning in note for note in notes.said if note.startswith("warning")] == [True] * warned


def test_stopped_after_its_last_step_it_only_writes_the_organ(model: Path, place: Path, workers: Workers) -> None:
    workers.stop = 12
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    run(model, place)
    assert workers.began == [0]
    assert names(place) == ["organ", "text.jsonl"]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(model: Path, place: Path, workers: Workers) -> None:
    run(model, place, "calm")
    workers.stop = 8
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    (last,) = (place / ".organ.training").glob("attempt-*/checkpoint_0008")
    (last / "optimizer.safetensors").write_bytes(b"")
    workers.stop = None
    run(model, place)
    assert workers.began == [0, 0, 4]
    assert contents(place / "organ") == contents(place / "calm")


@pytest.mark.parametrize("other", [{"lr": 1e-3}, {"seed": 1}, {"steps": 20}])
def test_what_was_stopped_is_not_gone_on_with_otherwise(model: Path, place: Path, workers: Workers, other: dict[str, Any]) -> None:
    workers.stop = 4
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    before = contents(place)
    with pytest.raises(RunError, match="another training into this place was stopped"):
        run(model, place, settings=other)
    assert contents(place) == before


def test_nor_with_text_that_was_changed_since(model: Path, place: Path, workers: Workers) -> None:
    workers.stop = 4
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    with (place / "text.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(RunError, match="another training into this place was stopped"):
        run(model, place)


def test_a_second_process_is_refused(model: Path, place: Path) -> None:
    (place / ".organ.training").mkdir()
    with FileLock(place / ".organ.training" / ".lock"), pytest.raises(RunError, match="running in another process"):
        run(model, place)


@pytest.mark.parametrize(
    ("out", "uri", "words"),
    [
        ("organ", "http://mlflow", "`out` is the relative path 'organ'.* e.g. out=/shared/organ"),
        (
            "/shared/organ",
            "sqlite:///mlflow.db",
            r"`tracking` is the relative path 'mlflow\.db'.*tracking=sqlite:////shared/mlflow\.db",
        ),
    ],
)
def test_a_submitted_job_writes_nothing_where_it_would_be_lost(
    monkeypatch: pytest.MonkeyPatch, out: str, uri: str, words: str
) -> None:
    monkeypatch.setenv(JOB_CONFIG, "{}")
    with pytest.raises(RecipeError, match=words):
        train("no-model", TrainingSpec(data=("none.txt",)), out, tracking=TrackingSpec(uri=uri))


def test_a_place_that_is_taken_is_refused_before_anything_is_read(place: Path) -> None:
    (place / "organ").mkdir()
    with pytest.raises(RunError, match="is there already"):
        run(place / "no-model", place)


@pytest.mark.parametrize(
    ("settings", "options", "error", "words"),
    [
        ({"context": 999}, {}, RecipeError, "`context` 999: .* was built for 128 positions"),
        ({}, {"workers": WorkerSpec(num=3)}, RecipeError, "`batch` 4 is no multiple of 3: 3 workers that read 1 contexts"),
        ({}, {"layers": "4-9"}, OrganError, "expected a stretch of 0-5"),
        ({}, {"organ": "cut", "layers": "1-3"}, OrganError, "`layers` and `licence` have no effect"),
        ({}, {"vocabulary": "maybe"}, OrganError, "expected one of refuse, warn"),
        ({"data": ["none.txt"]}, {}, DataError, "no such file, folder or pattern"),
        ({"text": "{words}"}, {}, DataError, "no column 'words'"),
        ({"held_out": 0.999999}, {}, DataError, "one context of 16 at least"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_left(
    model: Path, place: Path, settings: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(model, place, settings=settings, **options)
    assert names(place) == ["text.jsonl"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no text"),
        ('{"text": ""}\n', "holds no text"),
        ('{"text": "ab"}\n', "4 tokens to train on"),
        ("[]\n", "found list"),
    ],
)
def test_too_little_text_is_said_and_nothing_is_left(model: Path, place: Path, content: str, words: str) -> None:
    (place / "text.jsonl").write_text(content)
    with pytest.raises(DataError, match=words):
        run(model, place, settings={"held_out": 0})
    assert names(place) == ["text.jsonl"]


@pytest.mark.parametrize(
    ("dtype", "gpus", "settled"),
    [("auto", 0, "float32"), ("auto", 1, "bfloat16"), ("float32", 1, "float32"), ("bfloat16", 0, "bfloat16")],
)
def test_what_is_computed_in_goes_by_the_machine_unless_it_is_said(model: Path, dtype: str, gpus: int, settled: str) -> None:
    spec = TrainingSpec.model_validate({"data": "x", **SETTINGS, "dtype": dtype})
    assert settle(spec, WorkerSpec(gpus=gpus), open_checkpoint(str(model))).dtype == settled


def test_an_organ_of_another_model_is_refused_field_by_field(model: Path, place: Path) -> None:
    other = save_model(place / "wide", hidden_size=64, num_attention_heads=8)
    extract(str(other), "1-3", place / "cut")
    with pytest.raises(IncompatibleModels, match=r"hidden_size[\s\S]*num_attention_heads"):
        run(model, place, organ=place / "cut")
    assert names(place) == ["cut", "text.jsonl", "wide"]


def test_an_error_before_the_first_checkpoint_leaves_nothing_and_after_it_what_there_is(
    model: Path, place: Path, workers: Workers
) -> None:
    workers.error = NumericsError("the loss is nan")
    with pytest.raises(NumericsError):
        run(model, place)
    assert names(place) == ["text.jsonl"]
    workers.error, workers.stop = None, 4
    with pytest.raises(KeyboardInterrupt):
        run(model, place)
    workers.error = NumericsError("the loss is nan")
    with pytest.raises(NumericsError):
        run(model, place)
    assert names(place) == [".organ.training", "text.jsonl"]


def test_no_room_for_the_organ_keeps_the_training(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    extract(str(model), "1-3", place / "cut")
    monkeypatch.setattr("transplant_ray.organ.folder.write_safetensors", full)
    with pytest.raises(RunError, match="No space left on device"):
        run(model, place, organ=place / "cut")
    assert names(place) == [".organ.training", "cut", "text.jsonl"]
    monkeypatch.undo()
