"""The lessons of a comparison: what those of one model share, which there are, and how they are carried out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transplant_ray.distributed.facts import StepsDone
from transplant_ray.distributed.lessons import Tutors
from transplant_ray.errors import TransplantError
from transplant_ray.evaluate.learning import choose_rates
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.models.loading import read_tokenizer
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.learners import FullLearner, InPlaceLearner, Learner, LoraLearner, OrganLearner
from transplant_ray.organ.lessons import BEFORE, TEXTS, Learnt, Lesson, name_of, read_learnt
from transplant_ray.organ.pack import Cut, Pack, measuring_cut, pack_text, training_cut
from transplant_ray.organ.text import Passage, stream_passages
from transplant_ray.organ.training import Point
from transplant_ray.organ.wrapper import check_wrapper
from transplant_ray.pipeline.comparison_planning import layers_of, settled, stacked
from transplant_ray.pipeline.watch import Stopwatch, Watch
from transplant_ray.recipe import CompareRecipe, CorpusSpec, InPlaceMethod, LoraMethod, OrganMethod, TrainingSpec
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.comparison import ComparisonTracker

FORMAT = 2
"""Of the keys of lessons: larger whenever the same settings come to something else."""


@dataclass(frozen=True)
class Bench:
    """A model with all that its trainings share."""

    name: str
    recipient: Checkpoint
    training: TrainingSpec
    """With what depends on machine and model filled in; its learning rate and seed are any."""
    learners: Mapping[str, Learner]
    text: Path
    measured: Mapping[str, Path]
    content: Mapping[str, Any]
    """What decides what comes of a lesson, but for method, learning rate and seed."""
    overlap: Mapping[str, int]
    """Documents of a measured text that are trained on, word for word."""


@dataclass
class Run:
    """A comparison that is going on."""

    recipe: CompareRecipe
    folder: RunFolder
    watch: Stopwatch
    tracker: ComparisonTracker
    tutors: Tutors
    steps: dict[str, int] = field(default_factory=dict)
    """How far each lesson is."""
    recalled: int = 0

    @property
    def lessons(self) -> Path:
        return self.folder.path.absolute() / "lessons"


# -- what the trainings of a model share ---------------------------------------------------------------------------------


def make_bench(run: Run, name: str, recipient: Checkpoint) -> Bench:
    recipe, place = run.recipe, run.folder.path.absolute() / "work" / name
    shutil.rmtree(place, ignore_errors=True)  # read anew, whatever has become of the files; it takes little beside a training
    training = settled(recipe, recipient)
    with run.watch.stage(f"read the text for {name}", 0, "passages"):
        packs, overlap = _read_texts(run, recipient, training, place)
    content = {
        "format": FORMAT,
        "model": fingerprint(recipient),
        "text": packs["text"].record.model_dump(),
        **{text: packs[text].record.model_dump() for text in TEXTS},
        "training": training.model_dump(mode="json", exclude={"data", "text", "share", "lr", "seed"}),
    }
    learners = {method: _learner(recipe, method, recipient, place / method) for method in recipe.methods.wanted}
    for method, learner in learners.items():
        if isinstance(learner, OrganLearner):
            for warning in check_wrapper(recipient, learner.organ):
                run.watch.watch.note(f"warning: {name}, {method}: {warning}")
    return Bench(
        name, recipient, training, learners, packs["text"].folder, {text: packs[text].folder for text in TEXTS}, content, overlap
    )


def _read_texts(run: Run, recipient: Checkpoint, training: TrainingSpec, place: Path) -> tuple[dict[str, Pack], dict[str, int]]:
    """Packed: what is trained on and what is measured on; and how many documents of the latter are also among the former."""
    recipe = run.recipe
    corpora: dict[str, tuple[CorpusSpec, Cut]] = {
        "text": (training, training_cut(training)),
        "domain": (recipe.domain, measuring_cut(recipe.domain, training.context)),
        "general": (recipe.general, measuring_cut(recipe.general, training.context)),
    }
    tokenizer, vocabulary = read_tokenizer(recipient), recipient.config.vocab_size
    packs, digests = {}, {}
    for text, (corpus, cut) in corpora.items():
        digests[text] = set[bytes]()
        try:
            passages = _noted(stream_passages(corpus), digests[text], run.watch.watch)
            packs[text] = pack_text(passages, tokenizer, vocabulary, cut, place / text)
        except TransplantError as error:
            key = "training" if text == "text" else text
            raise type(error)(f"`{key}`: {error}") from error
    overlap = {text: len(digests[text] & digests["text"]) for text in TEXTS}
    for text, number in overlap.items():
        if number:
            run.watch.watch.note(
                f"warning: {number} of {len(digests[text])} documents of `{text}` are word for word in what is trained on: "
                "what is measured there flatters whoever learns by heart. Give other files, or shares with nothing in common"
            )
    return packs, overlap


def _noted(passages: Iterator[Passage], digests: set[bytes], watch: Watch) -> Iterator[Passage]:
    for passage in passages:
        digests.add(passage.digest)
        watch.advance(1)
        yield passage


def _learner(recipe: CompareRecipe, method: str, recipient: Checkpoint, place: Path) -> Learner:
    spec = recipe.methods.wanted[method]
    match spec:
        case OrganMethod():
            return OrganLearner(recipient, _cut_out(recipient, layers_of(recipe, method), place))
        case InPlaceMethod():
            return InPlaceLearner(recipient, _cut_out(recipient, layers_of(recipe, method), place))
        case LoraMethod():
            return LoraLearner(recipient, spec.rank, spec.scale)
        case _:
            return FullLearner(recipient)


def _cut_out(recipient: Checkpoint, layers: str, place: Path) -> Organ:
    return open_organ(extract_organ(recipient, layers, place))


# -- lessons ---------------------------------------------------------------------------------------------------------------


def tuning(run: Run, benches: Sequence[Bench]) -> Iterator[Lesson]:
    """The same rates for every method, all with the seed that is for this alone."""
    for bench in benches:
        for method in bench.learners:
            for lr in run.recipe.tune.lr:
                yield make_lesson(run, bench, method, "tune", lr, run.recipe.tune.seed)


def confirming(run: Run, benches: Sequence[Bench], tuned: Sequence[Learnt]) -> Iterator[Lesson]:
    rates = {(choice.model, choice.method): choice.lr for choice in choose_rates(tuned)}
    for bench in benches:
        for method in bench.learners:
            lr = rates[bench.name, method]
            if lr is None:
                run.watch.watch.note(f"warning: {bench.name}, {method}: every learning rate failed; it goes no further")
                continue
            for seed in run.recipe.seeds:
                yield make_lesson(run, bench, method, "confirm", lr, seed)


def make_lesson(run: Run, bench: Bench, method: str, stage: str, lr: float | None = None, seed: int | None = None) -> Lesson:
    spec = bench.training if lr is None else bench.training.model_copy(update={"lr": lr, "seed": seed})
    said = run.recipe.methods.wanted.get(method)
    settings = None if said is None else said.model_dump(mode="json")
    if method in stacked(run.recipe):
        settings = {"layers": layers_of(run.recipe, method)}
    content = {**bench.content, "method": method, "settings": settings, "stage": stage, "lr": lr, "seed": seed}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Lesson(
        key=key,
        model=bench.name,
        method=method,
        stage=stage,
        recipient=bench.recipient,
        learner=bench.learners.get(method),
        spec=spec,
        text=bench.text,
        measured=bench.measured,
        folder=run.lessons / name_of(key),
        keep=run.recipe.keep and stage == "confirm",
    )


def carry_out(run: Run, stage: str, lessons: list[Lesson]) -> list[Learnt]:
    """In the order of `lessons`; those that are known from before are not carried out again."""
    known = {lesson.key: learnt for lesson in lessons if (learnt := read_learnt(lesson)) is not None}
    new = [lesson for lesson in lessons if lesson.key not in known]
    run.recalled += sum(learnt.method != BEFORE for learnt in known.values())
    for learnt in known.values():
        run.tracker.log_learnt(_named(learnt, lessons))
    if known and new and stage != BEFORE:
        run.watch.watch.note(f"{stage}: {len(known)} of {len(lessons)} trainings are known from before")
    if new:
        steps = sum(lesson.spec.num_steps for lesson in new if lesson.trained)
        with run.watch.stage(stage, steps, "steps"):
            known |= run.tutors.carry_out(new, _Told(run).point, _Told(run).learnt)
    return [_named(known[lesson.key], lessons) for lesson in lessons]


def _named(learnt: Learnt, lessons: Sequence[Lesson]) -> Learnt:
    """Under the name that its model has in this recipe; the key knows models by their content."""
    return replace(learnt, model=next(lesson.model for lesson in lessons if lesson.key == learnt.key))


@dataclass(frozen=True)
class _Told:
    """Who is told of trainings that go on side by side."""

    run: Run

    def point(self, lesson: Lesson, point: Point) -> None:
        steps, watch = self.run.steps, self.run.watch.watch
        ahead = point.step - steps.get(lesson.key, 0)
        if ahead > 0:  # after a death steps come again
            steps[lesson.key] = point.step
            watch.advance(ahead)
            tokens = ahead * lesson.spec.batch * lesson.spec.context
            watch.hear(StepsDone(point.step, tokens, point.loss, point.held_out, lesson.name))

    def learnt(self, learnt: Learnt) -> None:
        if learnt.error is not None:
            rate = "" if learnt.lr is None else f", lr {learnt.lr:g}, seed {learnt.seed}"
            self.run.watch.watch.note(f"{learnt.model}, {learnt.method}{rate} failed: {learnt.error}")
        self.run.tracker.log_learnt(learnt)
