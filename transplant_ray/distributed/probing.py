"""The probe stage: source and target actors stream statistics to a ranking task; the source answers its own baseline too.

Both models at once where the cluster holds two actors, one after the other where it holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.actors import ModelActor, Workload
from transplant_ray.distributed.cluster import Capacity
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.task import Rendered, Split
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.compare import Comparison
from transplant_ray.probe.rankers import Evidence, Ranking, rank
from transplant_ray.probe.statistics import ActivationStats, Continuations

Advance = Callable[[int], None]
Role = Literal["source", "target"]


@dataclass(frozen=True)
class ProbePlan:
    """What the probe stage measures. `rankers` may hold none that needs activations; then no target is loaded."""

    rankers: tuple[str, ...]
    activations: bool
    trajectory: str
    settings: GenerationSettings
    probe: Sequence[Rendered]
    baselines: Mapping[Split, Sequence[Rendered]]
    """Split → examples that the source answers for itself."""
    seed: int


@dataclass(frozen=True)
class ProbeResult:
    rankings: list[Ranking]
    source: dict[Split, VariantShard]
    """The source's own answers, by split."""
    places: dict[str, dict[str, Any]]
    """Where each model was: device, node, GPUs."""


def run_probe(comparison: Comparison, plan: ProbePlan, workload: Workload, capacity: Capacity, advance: Advance) -> ProbeResult:
    """Load, measure, rank, and release the actors again. `advance` is told how many examples were measured or answered."""
    stage = _Stage(comparison, plan, workload, capacity, advance)
    return stage.side_by_side() if capacity.num_actors >= 2 else stage.in_turn()


@dataclass(frozen=True)
class _Stage:
    comparison: Comparison
    plan: ProbePlan
    workload: Workload
    capacity: Capacity
    advance: Advance

    def side_by_side(self) -> ProbeResult:
        with self._actor("source") as source, self._maybe_target() as target:
            places: dict[str, dict[str, Any]] = {"source": ray.get(source.where.remote())}
            texts = self._texts(source)
            streams = {"source": self._collect(source, texts)}
            if target is not None:
                places["target"] = ray.get(target.where.remote())
                streams["target"] = self._collect(target, texts)
            answers = {split: source.answer.remote(examples) for split, examples in self.plan.baselines.items()}
            statistics = self._follow(streams)
            return ProbeResult(self._rank(statistics), {s: ray.get(ref) for s, ref in answers.items()}, places)

    def in_turn(self) -> ProbeResult:
        statistics: dict[str, ActivationStats] = {}
        places: dict[str, dict[str, Any]] = {}
        with self._actor("source") as source:
            places["source"] = ray.get(source.where.remote())
            texts = self._texts(source)
            statistics |= self._follow({"source": self._collect(source, texts)})
            answers = {split: ray.get(source.answer.remote(examples)) for split, examples in self.plan.baselines.items()}
        with self._maybe_target() as target:
            if target is not None:
                places["target"] = ray.get(target.where.remote())
                statistics |= self._follow({"target": self._collect(target, texts)})
        return ProbeResult(self._rank(statistics), answers, places)

    @contextmanager
    def _actor(self, role: Role) -> Iterator[ActorHandle]:
        checkpoint: Checkpoint = getattr(self.comparison, role)
        with released(self.capacity.start(ModelActor, checkpoint, role, self.workload)) as actor:
            yield actor

    @contextmanager
    def _maybe_target(self) -> Iterator[ActorHandle | None]:
        if not self.plan.activations:
            yield None
            return
        with self._actor("target") as actor:
            yield actor

    def _texts(self, source: ActorHandle) -> Continuations | None:
        """The texts that activations are measured along; None where every model follows its own."""
        plan = self.plan
        if not plan.activations or plan.trajectory == "own":
            return None
        if plan.trajectory == "reference":
            return {example.id: example.answer_ids for example in plan.probe}
        texts: Continuations = ray.get(source.continuations.remote(plan.probe, plan.settings))
        return texts

    def _collect(self, actor: ActorHandle, texts: Continuations | None) -> Any:
        """A stream of counts that ends in the statistics of one model."""
        if not self.plan.activations:
            return iter(())
        modules = tuple(self.comparison.pairs)
        return collect.remote(actor, self.plan.probe, modules, self.plan.settings, texts)

    def _follow(self, streams: Mapping[str, Any]) -> dict[str, ActivationStats]:
        """Read the streams in turn, so that none runs far ahead, until each has given its statistics."""
        statistics: dict[str, ActivationStats] = {}
        waiting = dict(streams)
        while waiting:
            for role, stream in list(waiting.items()):
                ref = next(stream, None)
                item = None if ref is None else ray.get(ref)
                if isinstance(item, int):
                    self.advance(item)
                    continue
                del waiting[role]
                if item is not None:
                    statistics[role] = item
        return statistics

    def _rank(self, statistics: Mapping[str, ActivationStats]) -> list[Ranking]:
        modules = self.comparison.modules
        evidence = ray.put(Evidence(modules, self.plan.seed, statistics.get("source"), statistics.get("target")))
        return list(ray.get([rank_modules.remote(ranker, evidence) for ranker in self.plan.rankers]))


@ray.remote(num_cpus=0, max_retries=-1)
def collect(
    actor: ActorHandle,
    probe: Sequence[Rendered],
    modules: Sequence[str],
    settings: GenerationSettings,
    texts: Continuations | None,
) -> Iterator[int | ActivationStats]:
    """Merge what an actor streams; yields how many examples came, last the statistics. Backpressure keeps the stream short."""
    stream = actor.stream_stats.options(num_returns="streaming", _generator_backpressure_num_objects=4)
    parts: list[ActivationStats] = []
    for ref in stream.remote(probe, modules, settings, texts):
        parts.append(ray.get(ref))
        yield len({example for example, _ in parts[-1].keys})
    yield ActivationStats.merge(parts)


@ray.remote(num_cpus=0, max_retries=-1)
def rank_modules(ranker: str, evidence: Evidence) -> Ranking:
    """The ranking task."""
    return rank(ranker, evidence)


@contextmanager
def released(actor: ActorHandle) -> Iterator[ActorHandle]:
    """An actor that gives its GPUs back when the block ends."""
    try:
        yield actor
    finally:
        ray.kill(actor)


def num_probe_steps(plan: ProbePlan) -> int:
    """How often `advance` will be called for, in examples."""
    return len(plan.probe) * 2 if plan.activations else 0


def answer_alone(
    checkpoint: Checkpoint,
    name: str,
    splits: Mapping[Split, Sequence[Rendered]],
    workload: Workload,
    capacity: Capacity,
) -> dict[Split, VariantShard]:
    """What a checkpoint answers when it is loaded by itself, through plain `transformers`."""
    with released(capacity.start(ModelActor, checkpoint, name, workload)) as actor:
        answers = {split: actor.answer.remote(examples) for split, examples in splits.items()}
        return {split: ray.get(ref) for split, ref in answers.items()}
