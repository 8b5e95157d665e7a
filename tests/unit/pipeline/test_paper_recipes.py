r"""The paper's two experiments as the recipes have them, with and without a chat template: only weights and data are stood in for.

`prepare` is what `plan` and `sweep` begin with. The references are the paper's protocol and what `transformers` makes of messages.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import BOS, EOS, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from transplant_ray.errors import DataError
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.pipeline.planning import make_plan
from transplant_ray.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
NUM_QUESTIONS = 500
ROWS = [
    *(("paper-phi3", budget, budget not in (32, 512)) for budget in (32, 64, 128, 256, 512)),
    *(("paper-gemma2", budget, budget != 32) for budget in (32, 64, 128, 256, 512)),
]
"""Of its table: which pair, how many new tokens, and whether the model that the recipe takes for the target is the source there."""
INSTRUCTION = "You solve mathematical problems with care, one step at a time. Give nothing but the final answer, in \\boxed{}."

PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Experiment:
    family: str
    source: str
    target: str
    templates: dict[str, str | None]
    """Of source and target, made as the real ones are; only the target's is used."""


PAPER = {
    "paper-phi3": Experiment(
        "phi3",
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/Phi-3-mini-4k-instruct",
        {"source": "another one", "target": PHI},
    ),
    "paper-gemma2": Experiment("gemma2", "google/gemma-2-2b", "google/gemma-2-2b-it", {"source": None, "target": GEMMA}),
}


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    """A token for every character that the questions and the templates have, so that ids tell texts apart."""
    tokenizer = tiny_tokenizer(string.printable)
    tokenizer.chat_template = template
    return tokenizer


def questions() -> list[dict[str, Any]]:
    """As many as MATH-500 has, in its columns."""
    return [
        {
            "problem": f"Let $f(x) = \\frac{{x}}{{{n}}}$. What is $f({{{n}}})$ + {n}?",
            "solution": f"It is $1 + {n} = \\boxed{{{n + 1}}}$.",
            "answer": str(n + 1),
            "subject": "Algebra",
            "level": 1 + n % 5,
            "unique_id": f"test/algebra/{n}.json",
        }
        for n in range(1, NUM_QUESTIONS + 1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    (folder / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    for name, experiment in PAPER.items():
        for seed, (role, template) in enumerate(experiment.templates.items()):
            tokenizer, place = tokenizer_with(template), folder / name / role
            shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
            tiny_model(experiment.family, seed, **shape).save_pretrained(place)
            tokenizer.save_pretrained(place)
    return folder


def recipe(folder: Path, name: str, *overrides: str, swapped: bool = False) -> Recipe:
    source, target = ("target", "source") if swapped else ("source", "target")
    models = [f"source.model={folder / name / source}", f"target.model={folder / name / target}"]
    return load_recipe(RECIPES / f"{name}.yaml", [*models, f"task.data={folder / 'math500.jsonl'}", *overrides])


def with_template(name: str) -> list[str]:
    """The overrides that a comment in the recipe names."""
    (line,) = re.findall(r"# with a chat template: (.+)", (RECIPES / f"{name}.yaml").read_text())
    return str(line).split()


def rendered(job: Job) -> set[tuple[int, ...]]:
    return {example.prompt_ids for examples in job.examples.values() for example in examples}


def messages(name: str, problem: str) -> list[dict[str, str]]:
    """Phi's template knows a system, Gemma's none."""
    if name == "paper-gemma2":
        return [{"role": "user", "content": f"{INSTRUCTION}\n\n{problem}\n"}]
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem}]


def in_a_chat(name: str, problem: str) -> tuple[int, ...]:
    tokenizer = tokenizer_with(PAPER[name].templates["target"])
    return tuple(tokenizer.apply_chat_template(messages(name, problem), add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_papers_protocol(name: str) -> None:
    """The first row of its table: 32 new tokens. Greedy decoding is the only one that there is."""
    found = load_recipe(RECIPES / f"{name}.yaml")
    assert (found.source.model, found.target.model) == (PAPER[name].source, PAPER[name].target)
    assert found.sweep.k == (8, 16, 32, 64, 128)
    assert "all" in found.sweep.kind
    assert found.sweep.alpha == (1.0,)
    assert (found.rank.by[0], found.rank.trajectory, found.rank.max_new_tokens) == ("lae", "own", None)
    assert (found.task.max_new_tokens, found.task.scorer) == (32, "strict_boxed")
    assert (found.task.split.probe, found.task.split.seed) == (50, 42)
    assert not found.task.chat_template


@pytest.mark.parametrize("name", PAPER)
def test_without_a_template_prompts_are_plain_text(folder: Path, name: str) -> None:
    job, tokenizer = prepare(recipe(folder, name)), tokenizer_with(None)
    texts = [f"{INSTRUCTION}\n\n{row['problem']}\n" for row in questions()]
    assert rendered(job) == {tuple(tokenizer(text)["input_ids"]) for text in texts}
    assert make_plan(job).examples == {"probe": 50, "select": 200, "test": 250}


@pytest.mark.parametrize("name", PAPER)
def test_with_a_template_prompts_are_what_transformers_makes_of_the_messages(folder: Path, name: str) -> None:
    job = prepare(recipe(folder, name, *with_template(name)))
    expected = {in_a_chat(name, row["problem"]) for row in questions()}
    assert rendered(job) == expected
    assert {ids.count(BOS) for ids in expected} == {1 if name == "paper-gemma2" else 0}  # the template's, and no second one
    assert make_plan(job).examples == {"probe": 50, "select": 200, "test": 250}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", PAPER)
def test_answers_are_boxed_and_end(folder: Path, name: str, chat: bool) -> None:
    job, tokenizer = prepare(recipe(folder, name, *(with_template(name) if chat else ()))), tokenizer_with(None)
    answers = {example.answer_ids for examples in job.examples.values() for example in examples}
    boxed = [tokenizer(f"\\boxed{{{row['answer']}}}", add_special_tokens=False)["input_ids"] for row in questions()]
    assert answers == {(*ids, EOS) for ids in boxed}


@pytest.mark.parametrize(("name", "budget", "swapped"), ROWS)
def test_every_row_of_the_papers_table_is_an_override_away(folder: Path, name: str, budget: int, swapped: bool) -> None:
    job = prepare(recipe(folder, name, f"task.max_new_tokens={budget}", swapped=swapped))
    assert job.generation.max_new_tokens == job.probe_settings.max_new_tokens == budget
    assert job.rules.scorer == "strict_boxed"
    assert (job.recipe.sweep.k, job.recipe.task.split.seed) == ((8, 16, 32, 64, 128), 42)


def test_a_template_that_knows_no_system_says_what_to_do(folder: Path) -> None:
    with pytest.raises(DataError, match=r"System role not supported.*`task\.system=null`"):
        prepare(recipe(folder, "paper-gemma2", "task.chat_template=true"))


def test_a_base_model_that_receives_has_no_template(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the target's tokenizer has no chat template\. Set it to false"):
        prepare(recipe(folder, "paper-gemma2", *with_template("paper-gemma2"), swapped=True))
