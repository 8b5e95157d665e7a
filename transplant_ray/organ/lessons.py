"""One training of a comparison, from the model to what it has learnt: train, ship, put where it goes, measure.

A lesson has a folder of its own, in which it keeps its checkpoints and at the end `learnt.json`. Carried out again it goes on from
its last checkpoint, and one that is done says what it said.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from transplant_ray.errors import NumericsError
from transplant_ray.files import whole_folder, write_json
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.loading import load_model
from transplant_ray.organ.learners import Learner, Recovered
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.pack import Pack
from transplant_ray.organ.progress import latest_progress, save_progress
from transplant_ray.organ.training import Point, Rank, Training
from transplant_ray.recipe import TrainingSpec

LEARNT, SHIPPED, CHECKPOINT, CLOCK = "learnt.json", "shipped", "checkpoint_", "seconds.json"
BEFORE = "before"
"""In the place of a method: the recipient as it is."""
KEPT = 2
"""Checkpoints: the last may not have been written to its end."""
TEXTS = ("domain", "general")


@dataclass(frozen=True)
class Lesson:
    """Paths are absolute, for whoever carries it out is elsewhere."""

    key: str
    """Hash of all that decides what comes of it."""
    model: str
    method: str
    stage: str
    """`before`, `tune` or `confirm`; only what confirms is measured on `test`."""
    recipient: Checkpoint
    learner: Learner | None
    """None where nothing is trained."""
    spec: TrainingSpec
    text: Path
    """Packed, to train on."""
    measured: Mapping[str, Path]
    """The same of `domain` and `general`, to measure on."""
    folder: Path
    keep: bool
    """Whether what is shipped stays there."""

    @property
    def name(self) -> str:
        return name_of(self.key)

    @property
    def trained(self) -> bool:
        return self.learner is not None

    @property
    def lr(self) -> float | None:
        return self.spec.lr if self.trained else None

    @property
    def seed(self) -> int | None:
        return self.spec.seed if self.trained else None

    @property
    def label(self) -> str:
        return f"{self.model}, {self.method}" + (f", lr {self.spec.lr:g}, seed {self.spec.seed}" if self.trained else "")


@dataclass(frozen=True)
class SiteLoss:
    mode: str
    at: int
    loss: float | None
    """On `select` of the domain text, in nats a token; None where it is no number."""
    blocks: tuple[float, ...] = ()
    """Of each block of it."""


@dataclass(frozen=True)
class Learnt:
    """What came of a lesson. Losses are in nats a token."""

    key: str
    model: str
    method: str
    stage: str
    lr: float | None
    seed: int | None
    error: str | None = None
    """Why there is nothing to measure."""
    select: float | None = None
    """Mean loss on `select` of the domain text, at the site that it is lowest at."""
    site: str | None = None
    """Where an organ was put in: mode and position."""
    sites: tuple[SiteLoss, ...] = ()
    test: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of each text, the loss of every block of `test`."""
    parameters: int = 0
    """That were trained."""
    bytes: int = 0
    """Of all files that are shipped."""
    seconds: float = 0.0
    """Of training: without loading, checkpoints and measuring."""
    memory: int | None = None
    """Largest number of bytes on the GPU while it was trained; None on CPU."""
    tokens: int = 0
    curve: tuple[Point, ...] = ()

    @property
    def name(self) -> str:
        return name_of(self.key)

    def mean(self, text: str) -> float | None:
        """Of the losses on `test`."""
        return fmean(self.test[text]) if self.test.get(text) else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_short(self) -> dict[str, Any]:
        """Without what there is of every block and step: the means of `test` by text."""
        sites = [{"mode": site.mode, "at": site.at, "loss": site.loss} for site in self.sites]
        return {**self.to_json(), "sites": sites, "test": {text: self.mean(text) for text in TEXTS}, "curve": None}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Learnt:
        return cls(
            **{
                **said,
                "sites": tuple(SiteLoss(**{**site, "blocks": tuple(site["blocks"])}) for site in said["sites"]),
                "test": {text: tuple(losses) for text, losses in said["test"].items()},
                "curve": tuple(Point(**point) for point in said["curve"]),
            }
        )


def name_of(key: str) -> str:
    """Of a lesson's folder."""
    return key[:24]


def failed(lesson: Lesson, reason: str) -> Learnt:
    return replace(_blank(lesson), error=reason)


def _blank(lesson: Lesson) -> Learnt:
    return Learnt(lesson.key, lesson.model, lesson.method, lesson.stage, lesson.lr, lesson.seed)


def read_learnt(lesson: Lesson) -> Learnt | None:
    """None where the lesson is not done, or what it said is damaged; then it is carried out again."""
    try:
        learnt = Learnt.from_json(json.loads((lesson.folder / LEARNT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    whole = not (lesson.keep and lesson.trained and learnt.error is None) or (lesson.folder / SHIPPED).is_dir()
    return learnt if learnt.key == lesson.key and whole else None


def carry_out(lesson: Lesson, device: torch.device) -> Iterator[Point | Learnt]:
    """Train, ship and measure: points as they are reached, and at the end what was learnt.

    A training that diverges is learnt too, with the reason; other errors are raised.
    """
    if (learnt := read_learnt(lesson)) is not None:
        yield learnt
        return
    lesson.folder.mkdir(parents=True, exist_ok=True)
    try:
        trained = (yield from _train(lesson, device)) if lesson.trained else _blank(lesson)
        learnt = _measure(lesson, device, trained)
    except NumericsError as error:
        if not lesson.trained:
            raise
        learnt = failed(lesson, str(error))
    write_json(lesson.folder / LEARNT, learnt.to_json())
    for rest in lesson.folder.glob(f"{CHECKPOINT}*"):
        shutil.rmtree(rest, ignore_errors=True)
    if not lesson.keep or learnt.error is not None:
        shutil.rmtree(lesson.folder / SHIPPED, ignore_errors=True)
    yield learnt


def _train(lesson: Lesson, device: torch.device) -> Generator[Point, None, Learnt]:
    """To the last step, and ship; of what it says nothing is measured yet."""
    learner, spec = lesson.learner, lesson.spec
    assert learner is not None
    training = Training(learner.load(spec.seed), Pack.open(lesson.text), spec, Rank(device=device))
    clocks = _clocks(lesson.folder)
    seconds = 0.0
    if progress := latest_progress(clocks):
        progress.restore(training)
        seconds = clocks[progress.folder]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    points, start = training.run(), time.perf_counter()
    while (point := next(points, None)) is not None:
        seconds += time.perf_counter() - start
        yield point
        if training.is_due(point) and not training.done:
            _keep(training, seconds, lesson.folder)
        start = time.perf_counter()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    shutil.rmtree(lesson.folder / SHIPPED, ignore_errors=True)  # of an attempt that was stopped in the midst of it
    weights = {name: parameter.detach().cpu() for name, parameter in training.parameters.items()}
    shipped = learner.ship(weights, lesson.folder / SHIPPED, _record(lesson))
    return replace(
        _blank(lesson),
        parameters=sum(weight.numel() for weight in weights.values()),
        bytes=sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()),
        seconds=seconds,
        memory=memory,
        tokens=spec.num_tokens,
        curve=tuple(training.curve),
    )


def _clocks(folder: Path) -> dict[Path, float]:
    """Checkpoint → seconds of training up to it; one whose clock cannot be read is as little whole as one without weights."""
    found = {}
    for place in folder.glob(f"{CHECKPOINT}*"):
        with suppress(OSError, ValueError, TypeError, RecursionError):
            found[place] = float(json.loads((place / CLOCK).read_text(encoding="utf-8")))
    return found


def _keep(training: Training, seconds: float, folder: Path) -> None:
    with whole_folder(folder / f"{CHECKPOINT}{training.step:08}", replace=True) as new:
        save_progress(training, new)
        write_json(new / CLOCK, seconds)
    for old in sorted(folder.glob(f"{CHECKPOINT}*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _measure(lesson: Lesson, device: torch.device, learnt: Learnt) -> Learnt:
    """On `select` wherever it can go; on `test`, where that is opened, at the best of these sites alone."""
    shipped = lesson.folder / SHIPPED
    sites = lesson.learner.sites(shipped) if lesson.learner is not None else [None]
    recovered = _recover(lesson, shipped, device)
    blocks = {site: _losses(recovered(site), lesson, "domain", "select") for site in sites}
    on_select = {site: fmean(losses) for site, losses in blocks.items()}
    finite = {site: loss for site, loss in on_select.items() if isfinite(loss)}
    if not finite:
        raise NumericsError(f"the loss on domain text is {next(iter(on_select.values()))} after the training: it has diverged.")
    best = min(finite, key=lambda site: finite[site])
    test: dict[str, tuple[float, ...]] = {}
    if lesson.stage != "tune":
        model = recovered(best)
        test = {text: tuple(_losses(model, lesson, text, "test")) for text in TEXTS}
        if not all(isfinite(loss) for losses in test.values() for loss in losses):
            raise NumericsError("a loss on test text is no number after the training: it has diverged.")
    return replace(
        learnt,
        select=finite[best],
        site=None if best is None else str(best),
        sites=tuple(
            SiteLoss(site.mode, site.at, finite.get(site), tuple(blocks[site]) if site in finite else ())
            for site in sites
            if site is not None
        ),
        test=test,
    )


def _recover(lesson: Lesson, shipped: Path, device: torch.device) -> Recovered:
    """What a receiver would have: loaded again from what is shipped; the recipient where nothing is."""
    if lesson.learner is not None:
        return lesson.learner.recover(shipped, device)
    model: nn.Module = load_model(lesson.recipient, "float32").to(device)
    return lambda _: model


def _losses(model: nn.Module, lesson: Lesson, text: str, side: str) -> list[float]:
    blocks = Pack.open(lesson.measured[text]).side(side)
    rows = lesson.spec.micro_batch or lesson.spec.batch
    return list(block_losses(model, blocks, range(blocks.num), rows))


def _record(lesson: Lesson) -> dict[str, Any]:
    """What an organ says of its training: of the text nothing but its hash and how much it was."""
    text = Pack.open(lesson.text).record
    return {
        "method": lesson.method,
        "embedding": {"model": lesson.recipient.model, "revision": lesson.recipient.revision},
        "text": {"sha256": text.text, **{name: side.model_dump() for name, side in text.sides.items()}},
        "steps": lesson.spec.num_steps,
        "tokens": lesson.spec.num_tokens,
        "settings": lesson.spec.model_dump(mode="json", exclude={"data", "text"}),
    }
