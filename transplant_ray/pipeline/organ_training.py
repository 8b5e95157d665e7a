"""`organ train`: layers on text, in the frozen embedding and head of a model; what comes out is an organ like any other.

All that a training needs to go on lies in a folder beside the organ that it is to become, and vanishes when that is written:
the text as token ids, the layers as they were, and checkpoints. The same command, once it was stopped, goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transplant_ray.distributed.cluster import connect, refuse_vanishing_organ
from transplant_ray.distributed.facts import StepsDone
from transplant_ray.distributed.training import TrainingJob, find_progress, run_training, share_out
from transplant_ray.errors import OrganError, RecipeError, RunError
from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.loading import read_tokenizer
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.learners import OrganLearner
from transplant_ray.organ.pack import RECORD, Pack, pack_text, training_cut
from transplant_ray.organ.progress import Crew, Progress
from transplant_ray.organ.text import Passage, data_files, stream_passages
from transplant_ray.organ.training import Point
from transplant_ray.organ.vocabulary import CHOICES
from transplant_ray.organ.wrapper import check_wrapper
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.watch import Silent, Watch
from transplant_ray.pipeline.workplace import Workplace
from transplant_ray.recipe import HubData, ResourceSpec, TrackingSpec, TrainingSpec, WorkerSpec
from transplant_ray.tracking.training import TrainingTracker, tracked_training
from transplant_ray.versions import environment


@dataclass(frozen=True)
class Trained:
    organ: Organ
    curve: tuple[Point, ...]
    """All of it, also where the training was stopped in between."""
    warnings: tuple[str, ...]
    refused: tuple[str, ...] = ()
    """What MLflow did not take, each with the reason."""


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to begin, or to go on."""

    training: TrainingSpec
    workers: WorkerSpec
    recipient: Checkpoint
    organ: Organ
    """As it was before."""
    pack: Pack
    place: Workplace

    @property
    def learner(self) -> OrganLearner:
        return OrganLearner(self.recipient, self.organ)


def train(
    model: str,
    training: TrainingSpec,
    out: str | Path,
    *,
    layers: str = "default",
    organ: str | Path | None = None,
    revision: str | None = None,
    vocabulary: str = "refuse",
    licence: str | None = None,
    workers: WorkerSpec | None = None,
    tracking: TrackingSpec | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train layers of `model`, or an organ that was cut out before, in the embedding and head of `model`; writes an organ folder.

    Run again after it was stopped, it goes on from its last checkpoint and ends with the same weights. `tracking` None tells
    MLflow nothing. RunError where `out` exists, there is no room, or another training into `out` was begun.
    """
    if vocabulary not in CHOICES:
        raise OrganError(f"vocabulary {vocabulary!r}: expected one of {', '.join(CHOICES)}.")
    if organ is not None and (layers != "default" or licence is not None):
        raise OrganError("`layers` and `licence` have no effect on an organ that was cut out before. Leave them out.")
    refuse_vanishing_organ(out, tracking)
    target, workers, watch = Path(out).absolute(), workers or WorkerSpec(), watch or Silent()
    if target.exists():
        raise RunError(f"{out}: is there already. Choose another place, or move it away; nothing was written.")
    recipient = open_checkpoint(model, revision)
    training = settle(training, workers, recipient)
    place = Workplace(target.with_name(f".{target.name}.training"))
    with terminable(), place.claimed(_identity(training, recipient, organ, layers)):
        start = _cut_out(recipient, organ, layers, licence, place)
        warnings = check_wrapper(recipient, start, vocabulary)
        for warning in warnings:
            watch.note(f"warning: {warning}")
        ready = Prepared(training, workers, recipient, start, _pack(training, recipient, place, watch), place)
        with tracked_training(target.name, training, tracking, watch.note) if tracking else nullcontext() as tracker:
            progress = _train(ready, tracker, watch)
            record = training_record(ready, progress)
            ready.learner.ship(progress.weights(), target, record)
            if tracker is not None:
                tracker.log_record(record)
    place.remove()
    return Trained(open_organ(target), progress.curve, warnings, tracker.refused if tracker is not None else ())


def describe_training(trained: Trained) -> list[str]:
    """What came of it, in sentences."""
    record = trained.organ.manifest.training or {}
    text, curve = record["text"], record["held_out"]
    lines = [f"trained {record['steps']:,} steps on {record['tokens']:,} tokens; text of {text['train']['tokens']:,} tokens"]
    if curve:
        first, last = curve[0], curve[-1]
        lines.append(
            f"perplexity on {text['held_out']['documents']:,} held-out documents: {first['perplexity']:.4g} before, "
            f"{last['perplexity']:.4g} after"
        )
    return lines


def settle(training: TrainingSpec, workers: WorkerSpec, recipient: Checkpoint) -> TrainingSpec:
    """With what depends on machine and model filled in. RecipeError where batch or context do not fit them."""
    rows = training.micro_batch or max(1, training.batch // workers.num)
    if training.batch % (rows * workers.num):
        raise RecipeError(
            f"`batch` {training.batch} is no multiple of {rows * workers.num}: {workers.num} workers that read {rows} contexts "
            "at a time. Choose others."
        )
    most = getattr(recipient.config, "max_position_embeddings", None)
    if most is not None and training.context > most:
        raise RecipeError(f"`context` {training.context}: {recipient.model} was built for {most} positions. Give at most so many.")
    dtype = training.dtype if training.dtype != "auto" else "bfloat16" if workers.gpus else "float32"
    return training.model_copy(update={"dtype": dtype, "micro_batch": rows})


def training_record(ready: Prepared, progress: Progress) -> dict[str, Any]:
    """What the organ says of its training: of the text its hash and how much it was, and nothing that it says."""
    settings, text = ready.training.model_dump(mode="json", exclude={"data", "text"}), ready.pack.record
    held_out = [point for point in progress.curve if point.held_out is not None]
    return {
        "embedding": {"model": ready.recipient.model, "revision": ready.recipient.revision},
        "before": ready.organ.manifest.fingerprint,
        "earlier": ready.organ.manifest.training,
        "text": {
            "sha256": text.text,
            **{name: side.model_dump() for name, side in text.sides.items()},
        },
        "steps": progress.step,
        "tokens": ready.training.num_tokens,
        "settings": settings,
        "workers": ready.workers.num,
        "loss": progress.curve[-1].loss,
        "held_out": [_described(point) for point in (held_out[:1] + held_out[-1:])],
        "environment": environment(),
    }


def _described(point: Point) -> dict[str, Any]:
    return {
        "step": point.step,
        "loss": point.held_out,
        "perplexity": None if point.held_out is None else perplexity(point.held_out),
    }


def _identity(training: TrainingSpec, recipient: Checkpoint, organ: str | Path | None, layers: str) -> dict[str, Any]:
    """What must be the same for a training to go on; of files their sizes and dates, for reading them all again takes long."""
    files = [path for each in training.data if not isinstance(each, HubData) for path in data_files(each)]
    weights = [] if recipient.folder is None else [recipient.folder / name for name in recipient.weight_files()]
    return {
        "training": training.model_dump(mode="json"),
        "model": recipient.model,
        "revision": recipient.revision,
        "organ": layers if organ is None else open_organ(Path(organ)).manifest.fingerprint,
        "files": [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in (*files, *weights)],
    }


def _cut_out(recipient: Checkpoint, organ: str | Path | None, layers: str, licence: str | None, place: Workplace) -> Organ:
    """The layers as they are before, in an organ of their own: whoever goes on needs the same."""
    if organ is not None:
        return open_organ(Path(organ).absolute())
    if not place.organ.exists():
        extract_organ(recipient, layers, place.organ, licence)
    return open_organ(place.organ)


def _pack(training: TrainingSpec, recipient: Checkpoint, place: Workplace, watch: Watch) -> Pack:
    if not (place.pack / RECORD).exists():
        watch.stage("read the text", 0, "passages")
        passages = _counted(stream_passages(training), watch)
        pack_text(passages, read_tokenizer(recipient), recipient.config.vocab_size, training_cut(training), place.pack)
    pack = Pack.open(place.pack)
    if training.held_out and not pack.held_out.num:
        watch.note(
            f"{pack.record.sides['held_out'].tokens} tokens are held out, fewer than a context: there is no perplexity. A larger "
            "`held_out`, or more text, gives one"
        )
    return pack


def _counted(passages: Iterator[Passage], watch: Watch) -> Iterator[Passage]:
    for passage in passages:
        watch.advance(1)
        yield passage


def _train(ready: Prepared, tracker: TrainingTracker | None, watch: Watch) -> Progress:
    """To the last step, from wherever an earlier attempt has come to."""
    training, so_far = ready.training, find_progress(ready.place.folder)
    told = _Told(tracker, watch)
    watch.stage("train", training.num_steps, "steps")
    if so_far is not None:
        for point in so_far.curve:
            told.again(point)
        watch.advance(so_far.step)
        watch.note(f"goes on after step {so_far.step:,} of {training.num_steps:,}")
        if so_far.step >= training.num_steps:
            return so_far
    with connect(ResourceSpec(address=ready.workers.address, cpus_per_model=0.01)), terminable():
        threads = share_out(ready.workers)
        _note_another_crew(so_far, ready.workers, threads, watch)
        start = None if so_far is None else so_far.folder
        job = TrainingJob(ready.learner, training, ready.pack.folder, ready.place.folder, start, threads)
        return run_training(job, ready.workers, told.point, watch.note)


def _note_another_crew(so_far: Progress | None, workers: WorkerSpec, threads: int, watch: Watch) -> None:
    """On GPUs threads sum nothing up."""
    crew = Crew(workers.num, threads)
    if so_far is not None and not workers.gpus and so_far.crew != crew:
        watch.note(
            f"warning: goes on with {crew}, it came so far with {so_far.crew}. Sums are taken in another order, so the last bits "
            "of the weights may differ from those of a training that was not stopped; the same `--workers` and `--cpus` keep them"
        )


class _Told:
    """Who is told of a point, and what of it is new."""

    def __init__(self, tracker: TrainingTracker | None, watch: Watch) -> None:
        self.tracker, self.watch = tracker, watch
        self.last = Point(0, 0, None, 0.0)

    def point(self, point: Point) -> None:
        self.watch.advance(point.step - self.last.step)
        self.watch.hear(StepsDone(point.step, point.tokens - self.last.tokens, point.loss, point.held_out))
        self.again(point)

    def again(self, point: Point) -> None:
        """A point of an earlier attempt."""
        self.last = point
        if self.tracker is not None:
            self.tracker.log_point(point)
