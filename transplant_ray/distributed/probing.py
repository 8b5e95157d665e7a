"""The probe stage: source and target actors stream statistics to a ranking actor; the source answers its own baseline too.

Both models at once where the cluster holds two actors, one after the other where it holds one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.actors import Evaluator, ModelActor, Seen, Workload
from transplant_ray.distributed.cluster import Capacity, beside_the_driver, deaths_told
from transplant_ray.distributed.streams import steady
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered, Split
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.graft.norms import Norms, delta_norms
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.compare import Comparison
from transplant_ray.probe.measured import Cost, Measured
from transplant_ray.probe.rankers import Evidence, Ranking, rank
from transplant_ray.probe.search import Found
from transplant_ray.probe.statistics import ActivationStats, Continuations
from transplant_ray.recipe import ACTIVATION_RANKERS, REVERSE, GatesSpec, GreedySpec

Advance = Callable[[int], None]
OnAnswer = Callable[["Asked", VariantShard], None]
Role = Literal["source", "target"]


@dataclass(frozen=True)
class Asked:
    """A split of a task, to be answered by a model that is loaded by itself."""

    task: str
    split: Split
    examples: Sequence[Rendered]
    rules: Rules


Said = list[tuple[Asked, VariantShard]]
"""What came of it."""


@dataclass(frozen=True)
class ProbePlan:
    """What the probe stage measures. `rankers` may hold none that needs activations; then no target is loaded."""

    rankers: tuple[str, ...]
    activations: bool
    resident: tuple[str, ...]
    """Those of them that need both models in one place."""
    steps: int
    """Points on the path of `attribution`."""
    trajectory: str
    settings: GenerationSettings
    probe: Sequence[Rendered]
    rules: Rules
    """How the probe set would be answered: what rankers by loss read it by."""
    searches: Mapping[str, GatesSpec | GreedySpec]
    """What is searched for, by name, with its settings."""
    guards: Mapping[str, Sequence[Rendered]]
    """Probe examples of the guards that may be fitted on."""
    texts: Sequence[Rendered]
    """General text that may be fitted on."""
    baselines: Sequence[Asked]
    """What the source answers for itself."""
    seed: int


@dataclass(frozen=True)
class ProbeResult:
    rankings: list[Ranking]
    source: Said
    """The source's own answers."""
    places: dict[str, dict[str, Any]]
    """Where each model was: device, node, GPUs."""
    norms: Norms
    """How far source and target are apart, module by module."""
    found: Mapping[str, list[Found]]
    """What each search came upon."""
    failed: Mapping[str, str]
    """Searches that could not be made, with the reason."""


def run_probe(
    comparison: Comparison, plan: ProbePlan, workload: Workload, capacity: Capacity, advance: Advance, on_answer: OnAnswer
) -> ProbeResult:
    """Load, measure, rank, and release the actors again.

    `advance` is told how many examples were measured, `on_answer` at once what the source answers.
    """
    placed = RankingActor.options(scheduling_strategy=beside_the_driver())  # type: ignore[attr-defined] # what the decorator adds
    with released(placed.remote()) as ranking:
        norms = ranking.norms.remote(comparison)  # reads files while models load
        stage = _Stage(comparison, plan, workload, capacity, ranking, advance, on_answer)
        if plan.resident or plan.searches:
            stage.measure_resident()
        roles = _needed_models(plan)
        for group in [roles] if len(roles) < 2 or capacity.holds_both else [[role] for role in roles]:
            stage.measure(group)
        return ProbeResult(stage.rank(), stage.answers, stage.places, ray.get(norms), stage.found, stage.failed)


def _needed_models(plan: ProbePlan) -> list[Role]:
    """The source first, for its texts may lead both."""
    needed: dict[Role, bool] = {"source": plan.activations or bool(plan.baselines), "target": plan.activations}
    return [role for role, need in needed.items() if need]


class _Stage:
    """What was measured so far."""

    def __init__(
        self,
        comparison: Comparison,
        plan: ProbePlan,
        workload: Workload,
        capacity: Capacity,
        ranking: ActorHandle,
        advance: Advance,
        on_answer: OnAnswer,
    ) -> None:
        self.comparison, self.plan, self.workload = comparison, plan, workload
        self.capacity, self.ranking, self.advance, self.on_answer = capacity, ranking, advance, on_answer
        self.statistics: dict[Role, ActivationStats] = {}
        self.resident: dict[str, Measured] = {}
        self.found: dict[str, list[Found]] = {}
        self.failed: dict[str, str] = {}
        self.seconds = 0.0
        self.answers: Said = []
        self.places: dict[str, dict[str, Any]] = {}
        self.texts: Continuations | None = None

    def measure_resident(self) -> None:
        """One ranker after another, and the searches, on one resident pair; then it is gone."""
        plan, names = self.plan, frozenset(self.comparison.pairs)
        with released(self.capacity.start(Evaluator, "evaluator", self.comparison, names, self.workload)) as actor:
            for ranker in plan.resident:
                measuring = actor.measure.remote(ranker, plan.probe, plan.rules, plan.settings.batch_size, plan.steps)
                self.resident[ranker] = ray.get(measuring)
                self.advance(len(plan.probe))
            seen = Seen(plan.probe, plan.guards, plan.texts)
            for name, spec in plan.searches.items():
                found = ray.get(actor.search.remote(name, spec, seen, plan.rules, plan.settings.batch_size))
                if isinstance(found, str):
                    self.failed[name] = found
                else:
                    self.found[name] = found
                self.advance(len(plan.probe))

    def measure(self, roles: Sequence[Role]) -> None:
        """Everything that these models are needed for, side by side; then they are gone."""
        with ExitStack() as stack:
            actors = {role: stack.enter_context(released(self._start(role))) for role in roles}
            self.places |= dict(zip(actors, ray.get([actor.where.remote() for actor in actors.values()]), strict=True))
            source = actors.get("source")
            if source is not None:
                self.texts = self._texts(source)
            answers = _ask(source, self.plan.baselines) if source is not None else []
            start = time.perf_counter()
            streams = {role: self._collect(actor) for role, actor in actors.items()} if self.plan.activations else {}
            for asked, answer in answers:  # before its stream, which the source gives afterwards: they are kept at once
                self.answers.append((asked, ray.get(answer)))
                self.on_answer(*self.answers[-1])
            self._follow(streams)
            self.seconds += time.perf_counter() - start if streams else 0.0

    def rank(self) -> list[Ranking]:
        source, target = (self.statistics.get(role) for role in ("source", "target"))
        evidence = Evidence(self.comparison.modules, self.plan.seed, source, target, self.resident)
        rankings: list[Ranking] = ray.get(self.ranking.rank.remote(self.plan.rankers, evidence))
        return [self._with_cost(ranking) for ranking in rankings]

    def _with_cost(self, ranking: Ranking) -> Ranking:
        """Statistics are streamed once, whichever rankers read them; each of these is said to cost all of it."""
        streamed = ranking.ranker.removeprefix(REVERSE) in ACTIVATION_RANKERS
        if ranking.measured is None or not streamed:
            return ranking
        decodings = {"own": 2, "source": 1, "reference": 0}[self.plan.trajectory]
        cost = Cost(forwards=2, decodings=decodings, seconds=self.seconds)
        return replace(ranking, measured=replace(ranking.measured, cost=cost))

    def _start(self, role: Role) -> ActorHandle:
        return self.capacity.start(ModelActor, role, getattr(self.comparison, role), role, self.workload)

    def _texts(self, source: ActorHandle) -> Continuations | None:
        """The texts that activations are measured along; None where every model follows its own."""
        plan = self.plan
        if not plan.activations or plan.trajectory == "own":
            return None
        if plan.trajectory == "reference":
            return {example.id: example.answer_ids for example in plan.probe}
        texts: Continuations = ray.get(source.continuations.remote(plan.probe, plan.settings))
        return texts

    def _collect(self, actor: ActorHandle) -> Iterator[int | ActivationStats]:
        """Counts as they come, and in the end the statistics of one model."""
        modules = tuple(self.comparison.pairs)
        streaming = self.ranking.collect.options(num_returns="streaming", max_task_retries=0)
        return steady(self.ranking, lambda: streaming.remote(actor, self.plan.probe, modules, self.plan.settings, self.texts))

    def _follow(self, streams: Mapping[Role, Iterator[int | ActivationStats]]) -> None:
        """Read the streams in turn, so that none runs far ahead, until each has given its statistics."""
        waiting = dict(streams)
        while waiting:
            for role, stream in list(waiting.items()):
                item = next(stream)
                if isinstance(item, int):
                    self.advance(item)
                else:
                    self.statistics[role] = item
                    del waiting[role]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)
class RankingActor:
    """Where streams end and rankings are made: one process for all of it, for starting one takes longer than what it does.

    It remembers nothing, so that it may die at any time: what a call gives follows from what it is given.
    """

    def collect(
        self,
        actor: ActorHandle,
        probe: Sequence[Rendered],
        modules: Sequence[str],
        settings: GenerationSettings,
        texts: Continuations | None,
    ) -> Iterator[int | ActivationStats]:
        """Merge what an actor streams; yields how many examples came, last the statistics. Backpressure keeps the stream short."""
        streaming = actor.stream_stats.options(num_returns="streaming", max_task_retries=0, _generator_backpressure_num_objects=4)
        parts: list[ActivationStats] = []
        for part in steady(actor, lambda: streaming.remote(probe, modules, settings, texts)):
            parts.append(part)
            yield len({example for example, _ in parts[-1].keys})
        yield ActivationStats.merge(parts)

    def rank(self, rankers: Sequence[str], evidence: Evidence) -> list[Ranking]:
        return [rank(ranker, evidence) for ranker in rankers]

    def norms(self, comparison: Comparison) -> Norms:
        """Of the files that the driver sees, which nodes are held against."""
        return delta_norms(comparison)


@contextmanager
def released(actor: ActorHandle) -> Iterator[ActorHandle]:
    """An actor that gives its GPUs back when the block ends. ResourceError where its process dies again and again."""
    try:
        with deaths_told():
            yield actor
    finally:
        ray.kill(actor)


def num_probe_steps(plan: ProbePlan) -> int:
    """How often `advance` will be called for, in examples."""
    return len(plan.probe) * (2 * plan.activations + len(plan.resident) + len(plan.searches))


def answer_alone(
    checkpoint: Checkpoint, name: str, asked: Sequence[Asked], workload: Workload, capacity: Capacity
) -> Iterator[tuple[Asked, VariantShard]]:
    """What a checkpoint answers when it is loaded by itself, through plain `transformers`, as it comes."""
    with released(capacity.start(ModelActor, "evaluator", checkpoint, name, workload)) as actor:
        for one, answer in _ask(actor, asked):
            yield one, ray.get(answer)


def _ask(actor: ActorHandle, asked: Sequence[Asked]) -> list[tuple[Asked, Any]]:
    return [(one, actor.answer.remote(one.examples, one.rules)) for one in asked]
