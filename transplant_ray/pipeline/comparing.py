"""`organ compare`: organs, LoRA and full fine-tuning with the same data, tokens and tuning.

Per model and method the learning rate is chosen on `select` of the domain text, by trainings with a seed of their own; then every
seed is trained at that rate and measured on `test`, once, from what it ships. What came of a training is kept under the content
that it came of, so that the same command goes on where it stopped, and a recipe with one more seed trains that alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from transplant_ray.distributed.cluster import connect, plain_errors
from transplant_ray.distributed.facts import StepsDone
from transplant_ray.distributed.lessons import Tutors, resources_of, tutors
from transplant_ray.errors import NumericsError, RunError, TransplantError
from transplant_ray.evaluate.learning import Findings, choose_rates, find
from transplant_ray.files import writable_folder
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.fingerprint import fingerprint
from transplant_ray.models.loading import read_tokenizer
from transplant_ray.organ.extract import extract_organ, select_layers
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.learners import FullLearner, InPlaceLearner, Learner, LoraLearner, OrganLearner, require_peft
from transplant_ray.organ.lessons import BEFORE, SHIPPED, TEXTS, Learnt, Lesson, read_learnt
from transplant_ray.organ.pack import Cut, Pack, measuring_cut, pack_text, training_cut
from transplant_ray.organ.stack import read_stack
from transplant_ray.organ.text import Passage, data_files, stream_passages
from transplant_ray.organ.training import Point
from transplant_ray.organ.wrapper import check_wrapper
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.organ_training import settle
from transplant_ray.pipeline.watch import Silent, Stopwatch, Watch
from transplant_ray.recipe import (
    CompareRecipe,
    CorpusSpec,
    HubData,
    InPlaceMethod,
    LoraMethod,
    OrganMethod,
    TrainingSpec,
    WorkerSpec,
)
from transplant_ray.report.comparison import KIND, write_comparison
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.comparison import ComparisonTracker, summary_numbers, tracked_comparison
from transplant_ray.versions import environment

FORMAT = 1
"""Of the keys of lessons: larger whenever the same settings come to something else."""
OWNER = "comparison"
"""Of the run folder: any comparison of its name, for lessons are known by their content, and a changed recipe goes on in it."""


@dataclass(frozen=True)
class Compared:
    folder: RunFolder
    findings: Findings
    learnt: tuple[Learnt, ...]
    """Everything: the recipients as they are, the trainings that tuned, and those of the seeds."""
    summary: Mapping[str, Any]
    refused: tuple[str, ...] = ()
    """What MLflow did not take."""

    @property
    def failed(self) -> tuple[Learnt, ...]:
        return tuple(learnt for learnt in self.learnt if learnt.error is not None)

    @property
    def missing(self) -> tuple[str, ...]:
        """What has no result: methods without a learning rate that does not fail, and seeds. A rate that failed and was not chosen
        is a result."""
        methods = [f"{choice.model}, {choice.method}" for choice in self.findings.choices if choice.lr is None]
        seeds = [f"{each.model}, {each.method}, seed {each.seed}" for each in self.failed if each.stage == "confirm"]
        return (*methods, *seeds)


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


@dataclass(frozen=True)
class Planned:
    """What a comparison would do, of one model."""

    model: str
    recipient: Checkpoint
    layers: Mapping[str, str]
    """Of organ and in_place, as they are counted."""
    trainings: int
    steps: int
    tokens: int
    """Of each."""
    measurings: int
    """How often a text is read to measure: more than once a training only for organs, once for each position and mode."""


def compare(recipe: CompareRecipe, watch: Watch | None = None) -> Compared:
    """Tune, train and measure every method on every model; writes the run folder, its report, and MLflow.

    A training that diverges is a row with its reason, and loses the tuning. NumericsError, after everything else is kept, where all
    of them do. RunError where the folder is another run's.
    """
    checkpoints = {name: open_recipient(recipe, name) for name in recipe.named_models}
    plan(recipe, checkpoints)
    folder, stopwatch = RunFolder.of(recipe.storage, recipe.name), Stopwatch(watch or Silent())
    with (
        terminable(),
        _claimed(folder, recipe),
        tracked_comparison(recipe, stopwatch.watch.note) as tracker,
        connect(resources_of(recipe.resources)),
        plain_errors(),
        terminable(),
        tutors(recipe.resources, most_at_once(recipe), stopwatch.watch.note) as gathered,
    ):
        run = Run(recipe, folder, stopwatch, tracker, gathered)
        benches = [_bench(run, name, checkpoint) for name, checkpoint in checkpoints.items()]
        before = _carry_out(run, BEFORE, [_lesson(run, bench, BEFORE, BEFORE) for bench in benches])
        if broken := [learnt for learnt in before if learnt.error is not None]:
            raise NumericsError(f"{broken[0].model}, before anything is trained: {broken[0].error}")
        tuned = _carry_out(run, "tune", list(_tuning(run, benches)))
        confirmed = _carry_out(run, "confirm", list(_confirming(run, benches, tuned)))
        compared = _record(run, benches, before, tuned, confirmed)
    if not confirmed:
        raise NumericsError(
            f"no method has a learning rate that does not diverge: {tuned[0].error} What was tried is in {folder.path}; give "
            "lower rates in `tune.lr`."
        )
    return replace(compared, refused=tracker.refused)


def plan(recipe: CompareRecipe, checkpoints: Mapping[str, Checkpoint] | None = None) -> list[Planned]:
    """What a comparison would do, and every error that needs no weights and no text to be found."""
    if recipe.methods.lora is not None:
        require_peft()
    for corpus in (recipe.training, recipe.domain, recipe.general):
        for each in corpus.data:
            _ = each if isinstance(each, HubData) else data_files(each)
    found = []
    for name in recipe.named_models:
        recipient = (checkpoints or {}).get(name) or open_recipient(recipe, name)
        training = _settled(recipe, recipient)
        num_layers = len(read_stack(recipient).layers)
        ranges = {method: select_layers(_layers(recipe, method), num_layers) for method in _stacked(recipe)}
        num = len(recipe.tune.lr) + len(recipe.seeds)
        sites = 2 * num_layers + 2 - len(ranges["organ"]) if "organ" in ranges else 0
        others = len(recipe.methods.wanted) - ("organ" in ranges)
        found.append(
            Planned(
                name,
                recipient,
                {method: str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" for method, layers in ranges.items()},
                num * len(recipe.methods.wanted),
                training.num_steps,
                training.num_tokens,
                num * (sites + others) + len(TEXTS) * len(recipe.seeds) * len(recipe.methods.wanted) + 1 + len(TEXTS),
            )
        )
    return found


def open_recipient(recipe: CompareRecipe, name: str) -> Checkpoint:
    """Trainings run in other folders, so its path is absolute."""
    spec = recipe.named_models[name]
    checkpoint = open_checkpoint(spec.model, spec.revision)
    return checkpoint if checkpoint.folder is None else replace(checkpoint, folder=checkpoint.folder.resolve())


def sentences(findings: Findings) -> list[str]:
    """What it has shown, in words."""
    models = {standing.model for standing in findings.standings}
    several = len(models) > 1
    lines = [
        f"{choice.model}, {choice.method}: tuned at the edge of the grid (lr {choice.lr:g}), so a wider grid might do better"
        for choice in findings.choices
        if choice.at_edge
    ]
    lines += [f"{choice.model}, {choice.method}: every learning rate failed" for choice in findings.choices if choice.lr is None]
    verdicts = [(each.model, each.verdict) for each in findings.differences]
    verdicts += [(each.model, each.verdict) for each in findings.contrasts]
    return [f"{model}: {verdict}" if several else verdict for model, verdict in verdicts] + lines


@contextmanager
def _claimed(folder: RunFolder, recipe: CompareRecipe) -> Iterator[None]:
    """For the block this comparison's alone."""
    folder.check_owner(OWNER)
    lock = FileLock(writable_folder(folder.path) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{folder.path}: this comparison is running in another process. Wait for it, or choose another `name`."
        ) from None
    try:
        folder.claim(OWNER, recipe.to_yaml())
        yield
    finally:
        lock.release()


# -- what the trainings of a model share ---------------------------------------------------------------------------------


def _bench(run: Run, name: str, recipient: Checkpoint) -> Bench:
    recipe, place = run.recipe, run.folder.path.absolute() / "work" / name
    shutil.rmtree(place, ignore_errors=True)  # read anew, whatever has become of the files; it takes little beside a training
    training = _settled(recipe, recipient)
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


def _settled(recipe: CompareRecipe, recipient: Checkpoint) -> TrainingSpec:
    return settle(recipe.training.training(recipe.tune.lr[0], recipe.tune.seed), WorkerSpec(gpus=recipe.resources.gpus), recipient)


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


def _stacked(recipe: CompareRecipe) -> list[str]:
    """The methods that train a stack of layers."""
    return [name for name, spec in recipe.methods.wanted.items() if isinstance(spec, OrganMethod | InPlaceMethod)]


def _layers(recipe: CompareRecipe, method: str) -> str:
    spec = recipe.methods.wanted[method]
    assert isinstance(spec, OrganMethod | InPlaceMethod)
    return spec.layers if spec.layers is not None else recipe.methods.layers


def _learner(recipe: CompareRecipe, method: str, recipient: Checkpoint, place: Path) -> Learner:
    spec = recipe.methods.wanted[method]
    match spec:
        case OrganMethod():
            return OrganLearner(recipient, _cut_out(recipient, _layers(recipe, method), place))
        case InPlaceMethod():
            return InPlaceLearner(recipient, _cut_out(recipient, _layers(recipe, method), place))
        case LoraMethod():
            return LoraLearner(recipient, spec.rank, spec.scale)
        case _:
            return FullLearner(recipient)


def _cut_out(recipient: Checkpoint, layers: str, place: Path) -> Organ:
    return open_organ(extract_organ(recipient, layers, place))


# -- lessons ---------------------------------------------------------------------------------------------------------------


def _tuning(run: Run, benches: Sequence[Bench]) -> Iterator[Lesson]:
    """The same rates for every method, all with the seed that is for this alone."""
    for bench in benches:
        for method in bench.learners:
            for lr in run.recipe.tune.lr:
                yield _lesson(run, bench, method, "tune", lr, run.recipe.tune.seed)


def _confirming(run: Run, benches: Sequence[Bench], tuned: Sequence[Learnt]) -> Iterator[Lesson]:
    rates = {(choice.model, choice.method): choice.lr for choice in choose_rates(tuned)}
    for bench in benches:
        for method in bench.learners:
            lr = rates[bench.name, method]
            if lr is None:
                run.watch.watch.note(f"warning: {bench.name}, {method}: every learning rate failed; it goes no further")
                continue
            for seed in run.recipe.seeds:
                yield _lesson(run, bench, method, "confirm", lr, seed)


def _lesson(run: Run, bench: Bench, method: str, stage: str, lr: float | None = None, seed: int | None = None) -> Lesson:
    spec = bench.training if lr is None else bench.training.model_copy(update={"lr": lr, "seed": seed})
    said = run.recipe.methods.wanted.get(method)
    settings = None if said is None else said.model_dump(mode="json")
    if method in _stacked(run.recipe):
        settings = {"layers": _layers(run.recipe, method)}
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
        folder=run.lessons / key[:24],
        keep=run.recipe.keep and stage == "confirm",
    )


def most_at_once(recipe: CompareRecipe) -> int:
    """Trainings that do not wait for each other, and may go side by side."""
    most = len(recipe.named_models) * len(recipe.methods.wanted) * max(len(recipe.tune.lr), len(recipe.seeds))
    return most if recipe.resources.at_once is None else min(most, recipe.resources.at_once)


def _carry_out(run: Run, stage: str, lessons: list[Lesson]) -> list[Learnt]:
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
            watch.hear(StepsDone(point.step, ahead * lesson.spec.batch * lesson.spec.context, point.loss, point.held_out))

    def learnt(self, learnt: Learnt) -> None:
        if learnt.error is not None:
            rate = "" if learnt.lr is None else f", lr {learnt.lr:g}, seed {learnt.seed}"
            self.run.watch.watch.note(f"{learnt.model}, {learnt.method}{rate} failed: {learnt.error}")
        self.run.tracker.log_learnt(learnt)


# -- results ---------------------------------------------------------------------------------------------------------------


def _record(run: Run, benches: Sequence[Bench], before: list[Learnt], tuned: list[Learnt], confirmed: list[Learnt]) -> Compared:
    findings, learnt = find(before, tuned, confirmed), (*before, *tuned, *confirmed)
    summary = {
        "kind": KIND,
        "name": run.recipe.name,
        "models": {bench.name: bench.recipient.model for bench in benches},
        "budget": {
            "tokens": benches[0].training.num_tokens,
            "steps": benches[0].training.num_steps,
            "trainings_to_tune": len(run.recipe.tune.lr),
            "seeds": list(run.recipe.seeds),
            "tuning_seed": run.recipe.tune.seed,
            "context": benches[0].training.context,
            "batch": benches[0].training.batch,
            "cpus": run.recipe.resources.cpus,
            "gpus": run.recipe.resources.gpus,
        },
        "text": {bench.name: _text(bench) for bench in benches},
        "said": sentences(findings),
        **findings.to_json(),
        "learnt": [{**each.to_json(), "test": {text: each.mean(text) for text in TEXTS}, "curve": None} for each in learnt],
        "shipped": _link(run, confirmed) if run.recipe.keep else {},
        "recalled": run.recalled,
        "seconds": run.watch.seconds,
        "environment": environment(),
        "mlflow_run": run.tracker.run_id,
    }
    files = write_comparison(run.folder, summary)
    run.tracker.log_findings("\n\n".join(summary["said"]), summary_numbers(summary["standings"]), files)
    return Compared(run.folder, findings, learnt, summary)


def _link(run: Run, confirmed: Sequence[Learnt]) -> dict[str, str]:
    """`shipped/MODEL-METHOD-SEED`: names for what lies in the folders of lessons. Returns name → folder, inside of the run."""
    shutil.rmtree(run.folder.path / SHIPPED, ignore_errors=True)
    folder, found = writable_folder(run.folder.path / SHIPPED), {}
    for learnt in confirmed:
        if learnt.error is None:
            place = Path("lessons", learnt.key[:24], SHIPPED)
            (folder / f"{learnt.model}-{learnt.method}-{learnt.seed}").symlink_to(Path("..", place))
            found[f"{learnt.model}-{learnt.method}-{learnt.seed}"] = str(place)
    return found


def _text(bench: Bench) -> dict[str, Any]:
    packs = {"training": bench.text, **bench.measured}
    sides = {name: Pack.open(folder).record for name, folder in packs.items()}
    return {
        name: {
            "sha256": record.text,
            **{side: said.model_dump() for side, said in record.sides.items()},
            "also_trained_on": bench.overlap.get(name, 0),
        }
        for name, record in sides.items()
    }
