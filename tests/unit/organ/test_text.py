"""What is trained on is all text of the data, once and in order, and what is no text is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transplant_ray.errors import DataError
from transplant_ray.organ import text as module
from transplant_ray.organ.text import data_files, stream_passages
from transplant_ray.recipe import CorpusSpec, HubData

ROWS = [{"text": "one", "more": "1"}, {"text": "two\u2028lines", "more": "2"}, {"text": "", "more": "3"}]


def write_jsonl(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def write_parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return str(path)


def texts(*data: str | HubData, template: str = "{text}") -> list[str]:
    return [passage.text for passage in stream_passages(CorpusSpec(data=data, text=template))]


@pytest.mark.parametrize(("write", "name"), [(write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")])
def test_rows_are_documents_and_empty_ones_are_left_out(tmp_path: Path, write: Callable[[Path], str], name: str) -> None:
    data = write(tmp_path / name)
    assert texts(data) == ["one", "two\u2028lines"]
    assert texts(data, template="{more}: {text}") == ["1: one", "2: two\u2028lines", "3: "]


def test_a_hub_dataset_is_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    assert texts(HubData(path=str(tmp_path), split="train")) == ["one", "two\u2028lines"]


def test_name_and_revision_of_a_hub_dataset_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*place: str, split: str, revision: str) -> list[dict[str, str]]:
        asked.append((*place, split, revision))
        return ROWS[:1]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("hub:openai/gsm8k?name=main&split=train&revision=v1") == ["one"]
    assert texts(HubData(path="openai/gsm8k", name="main", split="train", revision="v1")) == ["one"]
    assert asked == [("openai/gsm8k", "main", "train", "v1")] * 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(lines=st.lists(st.text(alphabet="ab \u2028é", max_size=40), max_size=20), length=st.integers(1, 30), ended=st.booleans())
def test_a_plain_file_comes_back_whole_in_pieces(tmp_path: Path, lines: list[str], length: int, ended: bool) -> None:
    whole = "\n".join(lines) + ("\n" if ended else "")
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PASSAGE_CHARACTERS", length)
        passages = list(stream_passages(CorpusSpec(data=[str(tmp_path / "a.txt")])))
    assert "".join(passage.text for passage in passages) == whole
    assert [passage.first for passage in passages] == [place == 0 for place in range(len(passages))]
    assert [passage.last for passage in passages] == [place == len(passages) - 1 for place in range(len(passages))]
    assert all(len(passage.text) >= length and passage.text.endswith("\n") for passage in passages[:-1])


def test_a_folder_is_all_files_below_it_by_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.jsonl", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "row"}\n' if name.endswith("jsonl") else name)
    assert texts(str(tmp_path)) == ["row", "a/z.md", "b.txt"]
    assert data_files(str(tmp_path / "**" / "*.md")) == [tmp_path / "a" / "z.md"]


@pytest.mark.parametrize("data", ["none.txt", "*.none", "empty", "x" * 5000, "a\0b"])
def test_what_is_not_there_is_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such file, folder or pattern with files"):
        texts(str(tmp_path / data))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_what_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match=r"cannot be read as UTF-8 text|not a readable Parquet file"):
        texts(str(tmp_path / name))


def test_a_column_that_is_not_there_is_refused_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, row 1, `text`: no column 'txt'.*Did you mean \{text\}"):
        texts(write_jsonl(tmp_path / "a.jsonl"), template="{txt}")


@settings(deadline=None, max_examples=40)
@given(cut=st.floats(0.05, 0.95))
def test_shares_of_a_corpus_have_nothing_in_common_and_are_all_of_it(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    rows = [f"document {number}" for number in range(200)]
    path = tmp_path_factory.mktemp("share") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    low, high = ([p.text for p in stream_passages(CorpusSpec(data=[str(path)], share=share))] for share in ((0, cut), (cut, 1)))
    assert sorted([*low, *high]) == sorted(rows)
    assert abs(len(low) / 200 - cut) < 0.2


def test_what_is_left_out_of_a_file_parts_what_is_on_both_sides_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number} {'a' * 500}\n" for number in range(400)))
    whole = list(stream_passages(CorpusSpec(data=[str(path)])))
    part = list(stream_passages(CorpusSpec(data=[str(path)], share=(0, 0.5))))
    assert 0 < len(part) < len(whole)
    texts = [passage.text for passage in whole]
    for passage in part:
        place = texts.index(passage.text)
        before = texts[place - 1] if place else None
        assert passage.first == (before not in [other.text for other in part])
