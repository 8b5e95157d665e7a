"""A task as models are asked it: token ids, and how answers are limited and scored."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transplant_ray.evaluate.example import Rendered, Split, longest_answer, longest_choice
from transplant_ray.evaluate.task import load_task, tokenize
from transplant_ray.recipe import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: tuple[Split, ...] = ("probe", "select", "test")


@dataclass(frozen=True)
class Prepared:
    examples: dict[Split, tuple[Rendered, ...]]
    prompts: dict[str, str]
    """Example → what was asked, for people."""
    texts: tuple[str, ...]
    """What the tokenizers of both models must cut alike."""
    scorer: str
    max_new_tokens: int
    """Where nothing is decoded: tokens of the longest choice, or of the longest reference."""
    stop: tuple[str, ...]


def prepare_task(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, accept: Collection[str] = ()) -> Prepared:
    """Read, split and render a task. DataError or RecipeError where its data or its settings do not fit."""
    if spec.lm_eval is not None:
        from transplant_ray.evaluate.harness import load_harness_task  # of an optional library

        return load_harness_task(spec, spec.lm_eval, tokenizer, accept)
    task = load_task(spec)
    examples = {split: tokenize(task[split], spec, tokenizer, task.shots) for split in SPLITS}
    texts = [example.prompt + (example.answer if spec.measures == "loss" else "") for split in SPLITS for example in task[split]]
    texts += [shot.prompt + shot.answer for shot in task.shots]
    everything = [example for split in SPLITS for example in examples[split]]
    limit = spec.max_new_tokens or (longest_choice(everything) if spec.chooses else longest_answer(everything))
    prompts = {example.id: example.asked for split in SPLITS for example in task[split]}
    return Prepared(examples, prompts, tuple(texts), spec.scorer, limit, spec.stop)
