"""Tasks of lm-evaluation-harness that cannot be used are refused before a sweep; scorers that fail make one answer wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate import harness, harness_judge
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Completion
from transplant_ray.evaluate.harness_judge import JudgeWorker, judge
from transplant_ray.evaluate.outcome import score
from transplant_ray.evaluate.prepared import Prepared, prepare_task
from transplant_ray.evaluate.scorers import Grade
from transplant_ray.recipe import TaskSpec

pytest.importorskip("lm_eval")

SPLIT = {"probe": 2, "select": 3, "test": 4}
ROWS = [{"q": f"{n}+1=", "a": str(n + 1), "options": [str(n + 1), str(n), "no"], "gold": 0} for n in range(10)]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": EXACT,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
}  # fmt: skip
CHOSEN = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "options", "doc_to_target": "gold"}

Make = Callable[..., TaskSpec]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A task's file, and the setting that names it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(settings: dict[str, Any], extra: str = "", **given: Any) -> TaskSpec:
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        lines = [f"{key}: {json.dumps(value)}" for key, value in {"task": "sums", **data, **settings}.items()]
        path = tmp_path / "sums.yaml"
        path.write_text("\n".join([*lines, extra]))
        return TaskSpec.model_validate({"lm_eval": str(path), "split": SPLIT, **given})

    return write


def prepare(spec: TaskSpec, *accept: str) -> Prepared:
    return prepare_task(spec, tiny_tokenizer(), accept)


def first(task: Prepared) -> Rendered:
    return task.examples["test"][0]


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({**WRITTEN, "generation_kwargs": {"do_sample": True}}, {}, "ask for sampling .*completions here are greedy"),
        ({**WRITTEN, "generation_kwargs": {"num_beams": 4}}, {}, r"ask for \['num_beams'\]"),
        ({**CHOSEN, "output_type": "loglikelihood_rolling"}, {}, "asks for loglikelihood_rolling; expected generate_until"),
        ({**WRITTEN, "num_fewshot": 0}, {"num_fewshot": 2}, "`task.num_fewshot` has no effect"),
        (WRITTEN, {"metric": "acc"}, r"`task.metric` is 'acc'; .* has \['exact_match'\]"),
        (WRITTEN, {"filter": "strict"}, r"`task.filter` is 'strict'; .* has \['none'\]"),
        (CHOSEN, {"max_new_tokens": 4}, "`task.max_new_tokens` has no effect: .* reads choices"),
        (
            {**CHOSEN, "metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]},
            {},
            r"its metrics are \['f1'\], and none is a mean",
        ),
        (
            {**CHOSEN, "metric_list": [{"metric": "brier_score", "aggregation": "mean", "higher_is_better": True}]},
            {},
            "brier_score is .*, and neither 0 nor 1",
        ),
        (
            {**WRITTEN, "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}]},
            {},
            "of exact_match less is better",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(make: Make, settings: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        prepare(make(settings, **given))


def test_a_metric_that_is_a_truth_is_looked_for(make: Make) -> None:
    means = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("brier_score", "acc_norm", "acc")]
    assert '"metric": "acc_norm"' in prepare(make({**CHOSEN, "metric_list": means})).scorer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**WRITTEN, "doc_to_text": "{{nothing}}"}, "UndefinedError"),
        ({**WRITTEN, "test_split": "other"}, "cannot be loaded"),
        ({**WRITTEN, "dataset_path": "someone/nothing", "dataset_kwargs": None}, "cannot be loaded"),
        ({**WRITTEN, "doc_to_text": "{{ q.__class__.__mro__[1].__subclasses__() }}"}, "SecurityError"),
        ({**WRITTEN, "doc_to_target": "{{ ''['__class__'] }}"}, "SecurityError|unsafe"),
        ({**CHOSEN, "doc_to_target": "{{ 9 if q == '3+1=' else gold }}"}, "the answer 9 is none of the choices"),
    ],
)
def test_data_and_templates_that_do_not_fit_are_refused(make: Make, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepare(make(settings))


def test_a_chat_template_must_be_there(make: Make) -> None:
    with pytest.raises(DataError, match="the target's tokenizer has no chat template"):
        prepare(make(WRITTEN, chat_template=True))


def test_a_chat_template_writes_the_prompt(make: Make) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    task = prepare_task(make(WRITTEN, chat_template=True, system="be short"), tokenizer)
    assert first(task).doc is not None
    assert (
        tokenizer.decode(first(task).prompt_ids, skip_special_tokens=True) == f"system: be short\nuser: {first(task).doc['q']}\na:"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmlu", "stands for several tasks"),
        ("gsm8kk", "no such task. Did you mean .*gsm8k"),
    ],
)
def test_names_are_those_of_single_tasks(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        prepare(TaskSpec.model_validate({"lm_eval": name, "split": SPLIT}))


def test_a_name_is_found_in_the_library() -> None:
    path = harness._find("gsm8k", ())
    assert path.name == "gsm8k.yaml"
    assert path.is_relative_to(harness.library_tasks())


def test_without_the_library_the_message_says_how_to_install_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"not installed. Install it with pip install 'transplant-ray\[lm_eval\]'"):
        prepare(make(WRITTEN))


CODE = """
import os, time

def judge(doc, results):
    said = results[0]
    if said == "hang":
        time.sleep(60)
    if said == "die":
        os._exit(1)
    if said == "raise":
        raise OSError("no such thing")
    if said == "half":
        return {"exact_match": 0.5}
    return {"exact_match": said == doc["a"]}
"""


def test_code_runs_where_it_is_accepted_and_fails_for_one_answer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(CODE)
    spec = make(WRITTEN, "process_results: !function own.judge")
    with pytest.raises(RecipeError, match=r"runs code: `process_results: !function own\.judge`"):
        prepare(spec)
    task = prepare(spec, "task_code")
    example = first(task)
    worker = JudgeWorker(time_limit=3.0)
    monkeypatch.setattr(harness_judge, "_worker", lambda: worker)
    harness_judge._remembered.cache_clear()
    expected = {
        example.answer: Grade(True, example.answer),
        "raise": Grade(False, None, "OSError: no such thing"),
        "hang": Grade(False, None, "no answer within 3 s"),
        "die": Grade(False, None, "the task's scorer crashed"),
        "half": Grade(False, "half", "exact_match is 0.5, and neither 0 nor 1"),
        "other": Grade(False, "other"),
    }
    try:
        assert {said: judge(task.scorer, example, [said]) for said in expected} == expected
        outcome = score("v", example, Completion((5,), "hang", True), task.scorer)
    finally:
        worker.close()
        harness_judge._remembered.cache_clear()
    assert (outcome.correct, outcome.parsed, outcome.error) == (False, False, "no answer within 3 s")


def test_code_of_models_needs_acceptance_too(make: Make) -> None:
    spec = make({**WRITTEN, "unsafe_code": True})
    with pytest.raises(RecipeError, match="`unsafe_code`"):
        prepare(spec)
    assert first(prepare(spec, "task_code")).answer


def test_equal_rows_are_one_example(make: Make, tmp_path: Path) -> None:
    spec = make(WRITTEN)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:9], *ROWS[:9]]))
    ids = [example.id for examples in prepare(spec).examples.values() for example in examples]
    assert len(set(ids)) == len(ids) == 9
