"""A recipe made concrete: headers read and compared, data split, prompts rendered. Whatever can be refused is refused here, before
a weight is loaded or a process started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.example import Rendered, Split, check_answers, check_lengths, check_references
from transplant_ray.evaluate.generate import GenerationSettings, Rules, end_ids
from transplant_ray.evaluate.outcome import READS
from transplant_ray.evaluate.prepared import SPLITS, prepare_task
from transplant_ray.evaluate.scorers import FORCED, LOSS, check_scorer
from transplant_ray.evaluate.task import check_apart, load_passages
from transplant_ray.graft.mergekit import COMMAND, PIP_LINE, PLACE, find_mergekit
from transplant_ray.graft.plan import Planned, SweepPlan, depth_order, plan_sweep
from transplant_ray.graft.variant import Variant
from transplant_ray.models.catalogue import select_kind
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint, read_generation_ends
from transplant_ray.models.compare import Comparison, check_segmentation, check_vocabulary, compare
from transplant_ray.models.loading import load_tokenizer
from transplant_ray.models.rope import max_positions
from transplant_ray.recipe import (
    ACTIVATION_RANKERS,
    CHANNEL_RANKERS,
    MAIN,
    RESIDENT_RANKERS,
    SPARSE_MERGES,
    OrganRecipe,
    Recipe,
    TaskSpec,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_ROWS = 64
"""Rows of a batch where one model answers by itself and the recipe names no number."""


@dataclass(frozen=True)
class PreparedTask:
    """A task made concrete: its examples, and how they are answered and judged."""

    examples: Mapping[Split, tuple[Rendered, ...]]
    prompts: Mapping[str, str]
    """Example → what was asked, for people."""
    texts: tuple[str, ...]
    """What the tokenizers of both models must cut alike."""
    rules: Rules

    @property
    def decodes(self) -> bool:
        """Whether anything is generated; references and choices are read."""
        return self.rules.scorer not in READS and not self.examples["probe"][0].choices


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    comparison: Comparison
    tasks: Mapping[str, PreparedTask]
    """The task itself under MAIN, and the guards by their names."""
    passages: Mapping[Split, tuple[Rendered, ...]]
    """General text: the first token of each is its prompt. Empty where the recipe wants none."""
    base: Comparison | None = None
    """The base model, as a source, beside the target; None where the recipe names none."""

    @property
    def examples(self) -> Mapping[Split, tuple[Rendered, ...]]:
        return self.tasks[MAIN].examples

    @property
    def rules(self) -> Rules:
        return self.tasks[MAIN].rules

    @property
    def generation(self) -> GenerationSettings:
        return self.rules.generation

    @property
    def guards(self) -> Mapping[str, PreparedTask]:
        return {name: task for name, task in self.tasks.items() if name != MAIN}

    @property
    def reads_references(self) -> bool:
        """Whether the loss of every variant is measured beside its accuracy: where all references can be read, and have tokens."""
        if not self.recipe.sweep.loss or self.rules.scorer == LOSS:
            return False
        examples, positions = self.examples["select"], max_positions(self.comparison.target.config)
        longest = max(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
        return all(example.answer_ids for example in examples) and (positions is None or longest <= positions)

    @property
    def activations(self) -> bool:
        """Whether a ranker of the recipe measures activations."""
        return bool(ACTIVATION_RANKERS & self.recipe.rank.measured)

    @property
    def resident_rankers(self) -> tuple[str, ...]:
        """Rankers of the recipe that need both models in one place."""
        return tuple(sorted(RESIDENT_RANKERS & self.recipe.rank.measured))

    @property
    def probe_settings(self) -> GenerationSettings:
        return replace(self.generation, max_new_tokens=self.recipe.rank.max_new_tokens or self.generation.max_new_tokens)

    def provisional_plan(self) -> SweepPlan:
        """The plan's shape before anything is ranked: every ranker stands in depth order, and what a search may find is a blend.

        Refuses kinds that match nothing.
        """
        modules, recipe = self.comparison.modules, self.recipe
        alike = {module.name: (0.0,) * module.num_channels for module in modules} if recipe.sweep.channels else {}
        channels = {ranker: alike for ranker in recipe.rank.by if ranker in CHANNEL_RANKERS}
        return plan_sweep(modules, dict.fromkeys(recipe.rank.by, depth_order(modules)), recipe.sweep, channels, self._to_be_found())

    def _to_be_found(self) -> list[Planned]:
        found = []
        for name, spec in {} if self.recipe.search is None else self.recipe.search.wanted.items():
            members = [module.name for module in select_kind(self.comparison.modules, spec.kind, f"search.{name}.kind")]
            for place, penalty in enumerate(spec.penalty, start=1):
                blend = Variant.uniform(members, place / (len(spec.penalty) + 1.5))
                found.append(Planned("trial", blend, name, spec.kind, None, 1.0, penalty=penalty))
        return found


def prepare(recipe: Recipe) -> Job:
    """Read and check everything that the recipe names. Raises the error of whatever does not fit."""
    source = open_checkpoint(recipe.source.model, recipe.source.revision, accept=recipe.accept)
    target = open_checkpoint(recipe.target.model, recipe.target.revision, accept=recipe.accept)
    comparison = compare(source, target)
    base = _base(recipe, target)
    ours, theirs = load_tokenizer(target), load_tokenizer(source)
    ends = end_ids(read_generation_ends(target), ours)
    specs: dict[str, TaskSpec] = {MAIN: recipe.task, **recipe.guards.tasks}
    tasks = {name: make_task(recipe, spec, ours, ends) for name, spec in specs.items()}
    check_apart({name: list(task.prompts.values()) for name, task in tasks.items()})
    ours, theirs = load_tokenizer(target), load_tokenizer(source)
    check_vocabulary(theirs.get_vocab(), ours.get_vocab(), recipe.accept)
    texts = [text for task in tasks.values() for text in task.texts]
    check_segmentation(texts, lambda text: theirs(text)["input_ids"], lambda text: ours(text)["input_ids"], recipe.accept)
    passages = {} if recipe.guards.text is None else load_passages(recipe.guards.text, ours)
    job = Job(recipe, comparison, tasks, passages, base)
    _check_positions(job, max_positions(target.config))
    job.provisional_plan()
    return job


def make_task(
    recipe: Recipe | OrganRecipe, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]
) -> PreparedTask:
    """A task as models are asked it; `ends` are the tokens that end an answer. The error of whatever does not fit."""
    check_scorer(spec.scorer)
    task = prepare_task(spec, tokenizer, recipe.accept)
    if spec.scorer == FORCED:
        check_answers([example for split in SPLITS for example in task.examples[split]], task.max_new_tokens, ends)
    rules = Rules(GenerationSettings(task.max_new_tokens, ends, task.stop, batch_rows(recipe)), task.scorer)
    return PreparedTask(task.examples, task.prompts, task.texts, rules)


def batch_rows(recipe: Recipe | OrganRecipe) -> int:
    """Of a model that answers by itself."""
    return DEFAULT_ROWS if recipe.resources.batch_size == "auto" else recipe.resources.batch_size


def _check_positions(job: Job, positions: int | None) -> None:
    """Prompts with what is generated after them, and references and choices where they are read."""
    searched = job.recipe.search is not None
    read = {MAIN: job.recipe.sweep.screen is not None or bool(job.resident_rankers) or searched}
    read |= dict.fromkeys(job.recipe.guards.choosing, searched)
    for name, task in job.tasks.items():
        check_task_positions(task, positions, read=read.get(name, False))
    if job.activations:
        check_lengths(job.examples["probe"], job.probe_settings.max_new_tokens, positions)
    for passages in job.passages.values():
        check_references(passages, positions)


def check_task_positions(task: PreparedTask, positions: int | None, *, read: bool = False) -> None:
    """`read` where references are read although answers are decoded."""
    everything = [example for split in SPLITS for example in task.examples[split]]
    if task.decodes:
        check_lengths(everything, task.rules.generation.max_new_tokens, positions)
    if read or not task.decodes:
        check_references(everything, positions)


def _base(recipe: Recipe, target: Checkpoint) -> Comparison | None:
    """RecipeError where merges are asked for that need mergekit, and it is not installed."""
    if recipe.base is None:
        return None
    if (wanted := sorted(SPARSE_MERGES & set(recipe.sweep.controls.merges))) and find_mergekit() is None:
        raise RecipeError(
            f"`sweep.controls.merges`: {wanted} are made by {COMMAND}, which is not installed. `{PIP_LINE}`, here or in a venv of "
            f"its own with {PLACE}=VENV/bin/{COMMAND}, or leave them out."
        )
    return compare(open_checkpoint(recipe.base.model, recipe.base.revision, accept=recipe.accept), target)
