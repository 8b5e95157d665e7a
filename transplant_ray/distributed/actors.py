"""Actors that hold models. What they compute is in `probe`, `graft` and `evaluate`; here it is placed, streamed and retried."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
import torch
import transformers

from transplant_ray.distributed.meters import count_in_evaluator
from transplant_ray.distributed.preflight import check_node
from transplant_ray.errors import DeviceError, TransplantError
from transplant_ray.evaluate.answers import VariantShard, shard_name
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.measure_rows import measure_rows
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import Checkpoint, at_hand
from transplant_ray.models.compare import Comparison
from transplant_ray.models.loading import check_devices, devices_of, load_model, load_tokenizer, placement
from transplant_ray.probe.measured import Measured
from transplant_ray.probe.resident_rankers import Bench, measure
from transplant_ray.probe.search import Found, Search
from transplant_ray.probe.searches import SEARCHES
from transplant_ray.probe.statistics import ActivationStats, Continuations, greedy_continuations, stream_stats
from transplant_ray.recipe import GatesSpec, GreedySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Workload:
    """What every model actor is told once: how to load a model."""

    tokenizer: Checkpoint
    """The target: its tokenizer reads and writes for both models."""
    dtype: str
    num_gpus: float
    num_threads: int
    run: str = ""
    """Its name, for metrics."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the driver's libraries. An actor may come to a node that was not there when the nodes were looked at."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """Of the driver's copies of the checkpoints, by folder."""

    def check_node(self, *checkpoints: Checkpoint) -> None:
        """TransplantError where libraries or weights here are not those of the driver, whose name is on what comes of them."""
        check_node(self.versions, self.samples, checkpoints)


@dataclass(frozen=True)
class Seen:
    """What a search may look at, all of it probe examples."""

    examples: Sequence[Rendered]
    guards: Mapping[str, Sequence[Rendered]]
    """Without the one that is held out."""
    texts: Sequence[Rendered]


@ray.remote
class ModelActor:
    """One model as it is: streams activation statistics, continues prompts, answers for itself."""

    def __init__(self, checkpoint: Checkpoint, name: str, workload: Workload) -> None:
        _settle(workload)
        self.checkpoint = checkpoint
        self.name = name
        self.workload = workload

        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Not in __init__: an error there reaches the caller as the death of the actor, without its words."""
        if self._loaded is None:
            self.workload.check_node(self.checkpoint)
            with at_hand(self.checkpoint) as checkpoint:
                model = load_model(checkpoint, self.workload.dtype, placement(self.workload.num_gpus))
            self._loaded = model, load_tokenizer(self.workload.tokenizer)
        return self._loaded

    def where(self) -> dict[str, Any]:
        return _where(str(self._load()[0].device))

    def continuations(self, examples: Sequence[Rendered], settings: GenerationSettings) -> dict[str, tuple[int, ...]]:
        return greedy_continuations(*self._load(), examples, settings)

    def stream_stats(
        self,
        examples: Sequence[Rendered],
        modules: Sequence[str],
        settings: GenerationSettings,
        continuations: Continuations | None,
    ) -> Iterator[ActivationStats]:
        yield from stream_stats(*self._load(), examples, modules, settings, continuations)

    def answer(self, examples: Sequence[Rendered], rules: Rules) -> VariantShard:
        """What it answers, or the reason why it could not: one model that overflows must not end a sweep."""
        loaded = self._load()
        start = time.perf_counter()
        try:
            outcomes = answer_examples(self.name, *loaded, examples, rules.generation, rules.scorer)
        except (TransplantError, RuntimeError) as error:  # torch reports what a device cannot do as RuntimeError
            _restart_if_sick(loaded[0])
            asked = shard_name([example.id for example in examples])
            return VariantShard(self.name, (), time.perf_counter() - start, f"{type(error).__name__}: {error}", asked=asked)
        return VariantShard(self.name, outcomes, time.perf_counter() - start)


@ray.remote
class Evaluator:
    """A resident pair that answers as many variants at a time."""

    def __init__(self, comparison: Comparison, names: frozenset[str], workload: Workload) -> None:
        _settle(workload)
        self.comparison = comparison
        self.names = names
        self.workload = workload

        self._loaded: tuple[ResidentPair, PreTrainedTokenizerBase] | None = None
        self.engines: dict[Rules, Engine] = {}
        self.notes: list[str] = []

    def _load(self) -> tuple[ResidentPair, PreTrainedTokenizerBase]:
        if self._loaded is None:
            self.workload.check_node(self.comparison.source, self.comparison.target)
            place = placement(self.workload.num_gpus)
            pair = load_resident_pair(self.comparison, self.workload.dtype, place, self.names)
            self._loaded = pair, load_tokenizer(self.workload.tokenizer)
        return self._loaded

    def where(self) -> dict[str, Any]:
        return _where(str(self._load()[0].model.device))

    def measure_rows(self, examples: Sequence[Rendered], rules: Rules, most: int) -> Iterator[int]:
        """How many rows at a time this device likes, for these examples: one number."""
        pair, _ = self._load()
        longest = max(len(example.prompt_ids) for example in examples) + rules.generation.max_new_tokens
        yield measure_rows(pair.model, longest, most)

    def evaluate(
        self, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, rows: int
    ) -> Iterator[VariantShard]:
        """One result per variant. A variant that fails is a result with its reason; the others go on."""
        for shard in self._engine(rules, rows).answer(variants, examples):
            count_in_evaluator(self.workload.run, shard)
            evaluator, node = who()
            asked = shard_name([example.id for example in examples])
            yield replace(shard, notes=self._new_notes(), evaluator=evaluator, node=node, asked=asked)

    def losses(
        self, variants: Sequence[Variant], examples: Sequence[Rendered], rules: Rules, rows: int
    ) -> Iterator[dict[str, float | None]]:
        """Variant id → mean token loss of the reference answers; of all of them at once."""
        yield self._engine(rules, rows).losses(variants, examples)

    def divergences(
        self, variants: Sequence[Variant], texts: Sequence[Rendered], rules: Rules, rows: int
    ) -> Iterator[dict[str, tuple[float | None, ...]]]:
        """Variant id → KL(target ‖ variant) on each text; of all of them at once."""
        yield self._engine(rules, rows).divergences(variants, texts)

    def join(self) -> str:
        """Loads the pair, where the node's libraries and weights are the driver's; the id of the node where it is now."""
        self._load()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def measure(self, ranker: str, examples: Sequence[Rendered], rules: Rules, rows: int, steps: int) -> Measured:
        """What a ranker finds that needs both models; `steps` are those of `attribution`."""
        engine = self._engine(rules, rows)
        measured = measure(ranker, Bench(engine, self._source, examples, steps))
        return replace(measured, notes=(*measured.notes, *self._new_notes()))

    def search(self, name: str, spec: GatesSpec | GreedySpec, seen: Seen, rules: Rules, rows: int) -> list[Found] | str:
        """What one of the searches finds, or the reason why it could not."""
        bench = Bench(self._engine(rules, rows), self._source, seen.examples, steps=1)
        try:
            return SEARCHES[name](Search(bench, seen.guards, seen.texts), spec)
        except (TransplantError, RuntimeError) as error:
            _restart_if_sick(self._load()[0].model)
            return f"{type(error).__name__}: {error}"

    def _source(self) -> PreTrainedModel:
        """The source as it is, with embeddings and norms of its own."""
        return load_model(self.comparison.source, self.workload.dtype, placement(self.workload.num_gpus))

    def _engine(self, rules: Rules, rows: int) -> Engine:
        """At most `rows`; fewer where memory once ran out."""
        if rules not in self.engines:
            settings = replace(rules.generation, batch_size=rows)
            self.engines[rules] = Engine(*self._load(), settings, rules.scorer, self.notes.append)
        engine = self.engines[rules]
        engine.rows = min(engine.rows, rows)
        return engine

    def _new_notes(self) -> tuple[str, ...]:
        told, self.notes[:] = tuple(self.notes), []
        return told


def _restart_if_sick(model: torch.nn.Module) -> None:
    """Where a device no longer computes, this process ends once, for a new one may find it well; Ray starts it and asks again."""
    try:
        check_devices(*devices_of(model))
    except DeviceError:
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            os._exit(1)


def _settle(workload: Workload) -> None:
    torch.set_num_threads(workload.num_threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _where(device: str) -> dict[str, Any]:
    context = ray.get_runtime_context()
    return {
        "device": device,
        "node": context.get_node_id(),
        "gpus": context.get_accelerator_ids().get("GPU", []),
        "pid": os.getpid(),
    }


def who() -> tuple[str, str]:
    """This actor and its node, by the beginnings of Ray's ids."""
    context = ray.get_runtime_context()
    return context.get_actor_id()[:12], context.get_node_id()[:12]
