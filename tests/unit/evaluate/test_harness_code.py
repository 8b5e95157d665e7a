"""Files of tasks that run code: found wherever it stands, and nothing of it is run by looking."""

from __future__ import annotations

from pathlib import Path

import pytest

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate.harness_code import check_code

PLAIN = "task: sums\ndoc_to_text: '{{q}}'\nmetric_list: [{metric: acc, aggregation: mean}]\nfilter_list:\n- {name: a, filter: []}\n"


def write(folder: Path, text: str, name: str = "task.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_of_settings_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "base", "include: ../more.yml\nunsafe_code: false\n", "base.yaml")
    write(tmp_path, "output_type: generate_until", "more.yml")
    check_code(write(tmp_path, f"{PLAIN}include: [base/base.yaml, more.yml]"), tmp_path / "library")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_text: !function utils.text", r"`doc_to_text: !function utils\.text`"),
        ("metric_list: [{metric: !function 'm.f', aggregation: mean}]", r"`metric: !function m\.f`"),
        ("fewshot_config: {samples: !function m.list}", r"`samples: !function m\.list`"),
        ("class: !function m.Task", r"`class: !function"),
        ("custom_dataset: os.system", r"`custom_dataset` \(a function that makes the data\)"),
        ("unsafe_code: true", r"`unsafe_code` \(code that a model has written\)"),
        ("dataset_kwargs: {trust_remote_code: true}", r"`trust_remote_code` \(the code of a dataset\)"),
        ("metric_list: [{metric: bleu, hf_evaluate: true}]", r"`hf_evaluate` \(the code of a metric"),
        ("metric_list: [{metric: ./evil.py, aggregation: mean, higher_is_better: true}]", r"`metric: ./evil.py`, which is none of"),
        ("metric_list: [{metric: somebody/space}]", r"`metric: somebody/space`, which is none of the library's"),
        ("use_prompt: promptsource:x", r"`use_prompt`"),
    ],
)
@pytest.mark.parametrize("where", ["here", "included"])
def test_code_is_refused_and_named(tmp_path: Path, text: str, words: str, where: str) -> None:
    path = write(tmp_path, text if where == "here" else f"{PLAIN}include: below/first.yaml")
    write(tmp_path / "below", "include: second.yaml", "first.yaml")
    guilty = path if where == "here" else write(tmp_path / "below", text, "second.yaml")
    with pytest.raises(RecipeError, match=f"{guilty} runs code: {words}.*add `accept: \\[task_code\\]`"):
        check_code(path, tmp_path / "library")


def test_files_of_the_library_are_as_trusted_as_it_is(tmp_path: Path) -> None:
    inside = write(tmp_path / "library", "process_docs: !function utils.docs")
    check_code(inside, tmp_path / "library")
    check_code(write(tmp_path, f"{PLAIN}include: library/task.yaml"), tmp_path / "library")
    beside = write(tmp_path / "library_of_another", "process_docs: !function utils.docs")
    for path in (beside, write(tmp_path, f"{PLAIN}include: library/../library_of_another/task.yaml")):
        with pytest.raises(RecipeError, match="runs code"):
            check_code(path, tmp_path / "library")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("include: nothing.yaml", r"nothing\.yaml: cannot be read"),
        ("include: task.yaml", "includes itself"),
        ("- a list", "found list, expected the settings of a task"),
        ("a: [", "not the YAML of a task"),
        ("a: !!python/object/apply:os.system ['touch here']", "not the YAML of a task"),
        ("a: !!python/name:os.system", "not the YAML of a task"),
        ("a: !other x", "not the YAML of a task"),
        ("a: \xff", "cannot be read"),
        ("[" * 5000, "not the YAML of a task"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        check_code(path, tmp_path / "library")
    assert not (tmp_path / "here").exists()
