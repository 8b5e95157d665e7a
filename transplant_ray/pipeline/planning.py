"""`plan`: what a sweep would do and take, from configs and headers alone; `--measure` runs a few steps to tell how long."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from transplant_ray.evaluate.decode import decode
from transplant_ray.evaluate.engine import VARIANTS_PER_PACK
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.measure_rows import measure_rows
from transplant_ray.evaluate.race import num_answers, num_live
from transplant_ray.evaluate.read import read
from transplant_ray.graft.merges import planned_merges
from transplant_ray.graft.plan import SweepPlan
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.models.catalogue import Exclusion
from transplant_ray.models.loading import load_tokenizer, placement
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.recipe import MAIN, Recipe, ResourceSpec

CALIBRATION_TOKENS = 16


@dataclass(frozen=True)
class Memory:
    """Bytes of one actor."""

    weights: int
    cache: int
    """Keys and values of a full batch at its longest; an upper bound where a window is used."""

    @property
    def total(self) -> int:
        return self.weights + self.cache


@dataclass(frozen=True)
class Calibration:
    seconds_per_example: float
    """In a full batch; at the limit of new tokens where something is decoded: completions that end early cost less."""
    num_answers: int
    hours: float
    """Model-hours of the whole sweep: GPU-hours where `gpus_per_model` is 1."""
    device: str
    rows: int
    """Rows in flight at a time."""


@dataclass(frozen=True)
class Arms:
    """What telling the winner from chance takes."""

    num_arms: int
    sets_each: int
    num_answers: int
    """Completions on select and test, at most."""


@dataclass(frozen=True)
class PlanReport:
    """Everything `plan` prints."""

    family: str
    num_layers: int
    modules_per_kind: dict[str, int]
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    variants: dict[str, int]
    """Grid points by role."""
    num_distinct: int
    """Variants to evaluate, equal ones once; rankings that agree make it smaller."""
    examples: dict[str, int]
    guards: tuple[str, ...]
    """What else every variant that is not stopped is asked on select, in words."""
    num_answers: int
    """Completions to generate on select, at most; fewer with a screen or a race. Without those of the arms."""
    num_references: int
    """Reference answers that are read on select for losses, without decoding."""
    arms: Arms
    merges: tuple[str, ...]
    """Merging baselines; each is a checkpoint to make, to load, and to answer select."""
    memory: dict[str, Memory]
    placement: tuple[str, ...]


def plan(recipe: Recipe) -> PlanReport:
    """What a sweep of this recipe would do and take. Raises whatever the sweep itself would refuse before it starts."""
    return make_plan(prepare(recipe))


def make_plan(job: Job) -> PlanReport:
    comparison, recipe = job.comparison, job.recipe
    sweep_plan = job.provisional_plan()
    reads = job.reads_references or recipe.sweep.screen is not None
    kinds = Counter(m.role.kind for m in comparison.modules) + Counter(m.path.rpartition(".")[2] for m in comparison.modules)
    return PlanReport(
        family=comparison.target.config.model_type,
        num_layers=comparison.num_layers,
        modules_per_kind={"all": len(comparison.pairs), **kinds},
        excluded=comparison.excluded,
        warnings=comparison.warnings,
        notes=sweep_plan.notes,
        variants=dict(Counter(entry.role for entry in sweep_plan.entries)),
        num_distinct=len(sweep_plan.variants),
        examples={split: len(examples) for split, examples in job.examples.items()},
        guards=tuple(_guards(job)),
        num_answers=_num_select_answers(job, sweep_plan),
        num_references=len(sweep_plan.variants) * len(job.examples["select"]) if reads else 0,
        arms=_arms(job, sweep_plan),
        merges=tuple(merge.label for merge in planned_merges(recipe.sweep.controls)),
        memory={"probe actor": _memory(job, evaluator=False), "evaluator": _memory(job, evaluator=True)},
        placement=_placement(recipe.resources),
    )


def measure(job: Job) -> Calibration:
    """Load the pair in this process, decode one full batch for a few tokens, or read one, and extrapolate."""
    device_map = placement(job.recipe.resources.gpus_per_model)
    pair = load_resident_pair(job.comparison, job.recipe.resources.dtype, device_map)
    tokenizer = load_tokenizer(job.comparison.target)
    examples, limit = job.examples["select"], job.generation.max_new_tokens
    rows = job.recipe.resources.batch_size
    if rows == "auto":
        longest = max(len(example.prompt_ids) for example in examples)
        rows = measure_rows(pair.model, longest + limit, VARIANTS_PER_PACK * job.recipe.resources.shard_size)
    batch = [examples[row % len(examples)] for row in range(rows)]
    decodes = job.tasks[MAIN].decodes
    settings = GenerationSettings(min(CALIBRATION_TOKENS, limit), ())  # no end token: every row takes every step
    start = time.perf_counter()
    if decodes:
        prompts = [example.prompt_ids for example in batch]
        deque(decode(pair.model, tokenizer, prompts, settings, lambda _: None, rows), maxlen=0)
    else:
        parts = [part for example in batch for part in example.choices or (example,)]
        deque(read(pair.model, tokenizer, parts, settings, lambda _: None, rows, decodes=False), maxlen=0)
    per_example = (time.perf_counter() - start) / rows * (limit / settings.max_new_tokens if decodes else 1)
    answers = (
        _num_select_answers(job, plan := job.provisional_plan())
        + _arms(job, plan).num_answers
        + len(planned_merges(job.recipe.sweep.controls)) * len(examples)
        + 4 * sum(len(task.examples["test"]) for task in job.tasks.values())
        + 2 * len(job.examples["probe"])
    )
    return Calibration(per_example, answers, per_example * answers / 3600, str(pair.model.device), rows)


def count_answers(plan: SweepPlan, job: Job) -> int:
    """On select, to the task and its guards, when every variant that may be stopped is."""
    racers, sweep = len(plan.racers), job.recipe.sweep
    others, num_examples = len(plan.variants) - racers, len(job.examples["select"])
    live = num_live(racers, sweep.screen, sweep.race) + others
    guards = sum(len(guard.examples["select"]) for guard in job.guards.values())
    return num_answers(racers, others, num_examples, sweep.screen, sweep.race) + live * guards


def _guards(job: Job) -> Iterator[str]:
    for name, guard in job.guards.items():
        held_out = " (held out)" if name == job.recipe.guards.spared else ""
        yield f"{name}{held_out}, {len(guard.examples['select'])} examples"
    if job.passages:
        tokens = sum(len(passage.answer_ids) for passage in job.passages["select"])
        yield f"divergence on {len(job.passages['select'])} passages of general text, {tokens} tokens"


def _num_select_answers(job: Job, plan: SweepPlan) -> int:
    """With the source's own."""
    return count_answers(plan, job) + sum(len(task.examples["select"]) for task in job.tasks.values())


def _arms(job: Job, plan: SweepPlan) -> Arms:
    """Arms of one set have nothing to choose from, and answer on test alone."""
    sets_each = len(plan.arms[0]) if plan.arms else 0
    sets = {entry.id for arm in plan.arms for entry in arm} if sets_each > 1 else set()
    weighed = job.recipe.guards.choosing if job.recipe.sweep.objective else ()
    per_set = sum(len(job.tasks[name].examples["select"]) for name in (MAIN, *weighed))
    answers = len(sets) * per_set + len(plan.arms) * len(job.examples["test"])
    return Arms(len(plan.arms), sets_each, answers)


def _memory(job: Job, *, evaluator: bool) -> Memory:
    size = getattr(torch, job.recipe.resources.dtype).itemsize
    target = job.comparison.target
    source_parameters = sum(pair.source.num_parameters for pair in job.comparison.pairs.values()) if evaluator else 0
    return Memory((target.num_parameters + source_parameters) * size, _cache_values(job) * size)


def _cache_values(job: Job) -> int:
    """Keys and values in the cache of a full batch of the longest prompts."""
    config: Any = job.comparison.target.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prompts = [len(example.prompt_ids) for examples in job.examples.values() for example in examples]
    rows = min(job.generation.batch_size, len(prompts))
    return prod((2, job.comparison.num_layers, rows, heads, head_dim, max(prompts) + job.generation.max_new_tokens))


def _placement(resources: ResourceSpec) -> tuple[str, ...]:
    gpus, cpus, evaluators = resources.gpus_per_model, resources.cpus_per_model, resources.evaluators
    each = f"{gpus:g} GPU and {cpus:g} CPU" if gpus else f"{cpus:g} CPU"
    if resources.accelerator_type is not None:
        each += f" ({resources.accelerator_type})"
    pool = "as many evaluators as fit" if evaluators == "auto" else f"{evaluators} evaluator{'s' if evaluators > 1 else ''}"
    labels = {place: ", ".join(f"{name}={value}" for name, value in wanted.items()) for place, wanted in resources.labels.items()}
    return (
        f"probe: a source and a target actor, {each} each; one after the other where only one fits",
        f"evaluate: {pool} with target and source modules side by side, {each} each",
        *(f"{place}: on nodes with {wanted}" for place, wanted in labels.items()),
        f"confirm: the exported checkpoint, reloaded, {each}",
    )
