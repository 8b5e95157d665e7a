"""The organ demo's text: what Python brings along, made-up problems, and which of them is used."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from demos import small_text, some_documents

from transplant_ray.errors import DataError, RunError
from transplant_ray.organ.text import stream_passages
from transplant_ray.pipeline.demo_text import DemoText, find_gsm8k
from transplant_ray.recipe import CorpusSpec, DemoSpec
from transplant_ray.zoo.library_text import library_documents
from transplant_ray.zoo.word_problems import rows, word_problems

SPEC = DemoSpec(characters=20_000, problems=200)
MODULE = '''"""What the module is for.

A second paragraph of words that are said once."""

import os


def first(path):
    """The first of them."""
    return os.listdir(path)[0]


class Second:
    "One line."

    def third(self):
        return "not a docstring"
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library in small, with all that is to be left out."""
    root = tmp_path / "library"
    files = {
        "one.py": MODULE, "copy/one.py": MODULE, "notes.txt": "Notes that lie about.", "guide.rst": "A guide.",
        "test/leaked.py": "leaked = 1", "site-packages/leaked.py": "leaked = 2", "_sysconfigdata_x.py": "leaked = 3",
        "broken.py": "def (:", "binary.txt": "\udcff",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DemoText:
    return small_text(SPEC, tmp_path_factory.mktemp("demo") / "text", None)


def words(folder: Path, kind: str) -> str:
    return "\n".join(document.text for document in library_documents(10**7, folder) if document.kind == kind)


def test_docstrings_are_prose_and_the_rest_of_a_module_is_source(library: Path) -> None:
    prose, source = words(library, "prose"), words(library, "source")
    for said in ("What the module is for.", "The first of them.", "One line.", "Notes that lie about.", "A guide."):
        assert said in prose
        assert said not in source
    assert "os.listdir(path)[0]" in source
    assert 'return "not a docstring"' in source


def test_tests_packages_and_what_is_there_twice_are_left_out(library: Path) -> None:
    documents = library_documents(10**7, library)
    assert not any("leaked" in document.text for document in documents)
    assert max(Counter(document.text for document in documents).values()) == 1


def test_text_of_this_python_is_the_same_every_time_and_within_its_size() -> None:
    pytest.importorskip("pydoc_data.topics")
    documents = some_documents(60_000)
    assert documents == some_documents(60_000)
    assert 30_000 < sum(len(document.text) for document in documents) <= 60_000
    assert {document.kind for document in documents} == {"prose", "source"}


def test_made_up_problems_are_distinct_repeatable_and_varied() -> None:
    problems = word_problems(2000, seed=3)
    assert problems == word_problems(2000, seed=3)
    assert problems != word_problems(2000, seed=4)
    assert len({problem.question for problem in problems}) == 2000
    assert all(problem.question.endswith("?") and problem.answer >= 0 for problem in problems)
    skeletons = Counter(re.sub(r"\d+", "0", problem.question) for problem in problems)
    assert len(skeletons) > 1500  # not a handful of templates with other numbers
    counts = Counter(word for problem in problems for word in problem.question.split())
    total = sum(counts.values())
    assert -sum(count / total * math.log(count / total) for count in counts.values()) > math.log(150)


def test_answers_follow_from_the_questions() -> None:
    """By another way of reading: wherever two whole parts are asked for, they multiply back."""
    found = 0
    for problem in word_problems(2000, seed=5):
        if match := re.search(r"share (\d+) .* equally among (\d+) ", problem.question):
            rest = re.search(r"(\d+) of the", problem.question)
            assert int(match[1]) == int(match[2]) * problem.answer + (int(rest[1]) if rest else 0)
            found += 1
        if match := re.search(r"at (\d+) miles per hour for (\d+) hours\. How far", problem.question):
            assert problem.answer == int(match[1]) * int(match[2])
            found += 1
    assert found > 100


def test_without_gsm8k_the_stand_in_is_used_and_that_is_said(text: DemoText) -> None:
    assert text.stand_in
    assert "stand-in" in text.domain_is
    (row, *_), number = rows(word_problems(1)), text.record["domain"]["documents"]
    assert row.keys() == {"question", "answer"}
    assert number == SPEC.problems
    assert len(list(stream_passages(CorpusSpec(data=(text.record["domain"]["file"],), text="{question}")))) == number


def test_gsm8k_is_read_where_it_lies(tmp_path: Path) -> None:
    given = tmp_path / "gsm8k"
    given.mkdir()
    (given / "train.jsonl").write_text('{"question": "How many?", "answer": "#### 3"}\n')
    found = find_gsm8k(given)
    assert found == given / "train.jsonl"
    made = small_text(SPEC, tmp_path / "text", found)
    assert not made.stand_in
    assert (made.folder / "domain.jsonl").readlink() == found


def test_gsm8k_that_was_named_and_is_not_there_is_no_stand_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file, or no `train\.jsonl` in it"):
        find_gsm8k(tmp_path)


def test_shares_have_no_document_in_common_and_leave_none_out(text: DemoText) -> None:
    for which in ("general", "domain"):
        sides = [{p.text for p in stream_passages(CorpusSpec(**side(which)))} for side in (text.trained_on, text.measured_on)]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert len(sides[0] | sides[1]) == text.record[which]["documents"]


def test_text_of_other_settings_is_not_taken(text: DemoText) -> None:
    assert small_text(SPEC, text.folder, None) == text
    with pytest.raises(RunError, match="holds other text"):
        small_text(SPEC.model_copy(update={"problems": 300}), text.folder, None)
