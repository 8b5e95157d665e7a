"""A recipe made concrete: headers read and compared, data split, prompts rendered. Whatever can be refused is refused here, before
a weight is loaded or a process started."""

from __future__ import annotations

from dataclasses import dataclass

from transplant_ray.evaluate.example import Rendered, Split, check_answers, check_lengths
from transplant_ray.evaluate.generate import GenerationSettings, end_ids
from transplant_ray.evaluate.prepared import SPLITS, prepare_task
from transplant_ray.evaluate.scorers import FORCED, check_scorer
from transplant_ray.graft.plan import SweepPlan, depth_order, plan_sweep
from transplant_ray.models.checkpoint import open_checkpoint, read_generation_ends
from transplant_ray.models.compare import Comparison, check_segmentation, check_vocabulary, compare
from transplant_ray.models.loading import load_tokenizer
from transplant_ray.models.rope import max_positions
from transplant_ray.recipe import ACTIVATION_RANKERS, RESIDENT_RANKERS, Recipe

DEFAULT_ROWS = 64
"""Rows of a batch where one model answers by itself and the recipe names no number."""


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    comparison: Comparison
    examples: dict[Split, tuple[Rendered, ...]]
    generation: GenerationSettings
    scorer: str

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
        limit = self.recipe.rank.max_new_tokens or self.generation.max_new_tokens
        return GenerationSettings(limit, self.generation.end_ids, self.generation.stop, self.generation.batch_size)

    def provisional_plan(self) -> SweepPlan:
        """The plan's shape before anything is ranked: every ranker stands in depth order. Refuses kinds that match nothing."""
        order = depth_order(self.comparison.modules)
        return plan_sweep(self.comparison.modules, dict.fromkeys(self.recipe.rank.by, order), self.recipe.sweep)


def prepare(recipe: Recipe) -> Job:
    """Read and check everything that the recipe names. Raises the error of whatever does not fit."""
    source = open_checkpoint(recipe.source.model, recipe.source.revision, accept=recipe.accept)
    target = open_checkpoint(recipe.target.model, recipe.target.revision, accept=recipe.accept)
    comparison = compare(source, target)
    check_scorer(recipe.task.scorer)
    ours, theirs = load_tokenizer(target), load_tokenizer(source)
    task = prepare_task(recipe.task, ours, recipe.accept)
    check_vocabulary(theirs.get_vocab(), ours.get_vocab(), recipe.accept)
    check_segmentation(task.texts, lambda text: theirs(text)["input_ids"], lambda text: ours(text)["input_ids"], recipe.accept)
    ends = end_ids(read_generation_ends(target), ours)
    rows = DEFAULT_ROWS if recipe.resources.batch_size == "auto" else recipe.resources.batch_size
    everything = [example for split in SPLITS for example in task.examples[split]]
    generation = GenerationSettings(task.max_new_tokens, ends, task.stop, rows)
    job = Job(recipe, comparison, task.examples, generation, task.scorer)
    limit = max(generation.max_new_tokens, recipe.rank.max_new_tokens or 0)
    if recipe.task.scorer == FORCED:
        check_answers(everything, generation.max_new_tokens, ends)
    if recipe.sweep.screen is not None or job.resident_rankers:  # reference answers are read
        limit = max(limit, *(len(example.answer_ids) for example in everything))
    check_lengths(everything, limit, max_positions(target.config))
    job.provisional_plan()
    return job
