"""Every token once, in whole blocks, whoever reads them; what is held out is not trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import BOS, EOS, VOCABULARY, tiny_tokenizer

from transplant_ray.errors import DataError, RunError
from transplant_ray.organ.pack import Order, Pack, pack_text, training_cut
from transplant_ray.organ.text import Passage
from transplant_ray.recipe import TrainingSpec

TOKENIZER = tiny_tokenizer()
DOCUMENTS = st.lists(st.text(alphabet="abc ", min_size=1, max_size=30), min_size=1, max_size=30)


def spec(**changes: object) -> TrainingSpec:
    return TrainingSpec.model_validate({"data": ["x"], "context": 8, "steps": 1000, "batch": 4, "held_out": 0, **changes})


def pack(folder: Path, passages: list[Passage], vocabulary: int = VOCABULARY, **changes: object) -> Pack:
    return pack_text(passages, TOKENIZER, vocabulary, training_cut(spec(**changes)), folder / "pack")


def tokens(pack: Pack, name: str = "train") -> list[int]:
    return list(np.fromfile(pack.folder / f"{name}.bin", dtype=pack.record.dtype))


def document(text: str) -> list[int]:
    return [BOS, *TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(texts=DOCUMENTS, vocabulary=st.sampled_from([VOCABULARY, 100_000]))
def test_every_token_is_there_once_in_order_and_blocks_are_whole(tmp_path: Path, texts: list[str], vocabulary: int) -> None:
    expected = [token for text in texts for token in document(text)]
    if len(expected) < 8:
        return
    made = pack(tmp_path, [Passage(text) for text in texts], vocabulary)
    assert tokens(made) == expected
    assert made.record.sides["train"].documents == len(texts)
    blocks = made.train.read(range(made.train.num))
    assert blocks.shape == (len(expected) // 8, 8)
    assert blocks.flatten().tolist() == expected[: blocks.numel()]
    assert Pack.open(made.folder) == made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(texts=DOCUMENTS, cuts=st.integers(1, 5), seed=st.integers(0, 5))
def test_pieces_of_a_document_are_one_document_and_both_sides_are_all(
    tmp_path: Path, texts: list[str], cuts: int, seed: int
) -> None:
    texts = [*texts, "a" * 40]
    pieces = [[text[at : at + cuts] for at in range(0, len(text), cuts)] for text in texts]
    passages = [Passage(p, at == 0, at == len(each) - 1) for each in pieces for at, p in enumerate(each)]
    whole = pack(tmp_path / "whole", passages)
    assert tokens(whole) == [token for text in texts for token in document(text)]
    try:
        split = pack(tmp_path / "split", passages, held_out=0.4, seed=seed)
    except DataError:
        return  # all of it is held out
    ours, theirs = tokens(split), tokens(split, "held_out")
    assert Counter(t for t in [*ours, *theirs] if t not in (BOS, EOS)) == Counter(t for t in tokens(whole) if t not in (BOS, EOS))
    for side in (ours, theirs):  # what begins ends, and nothing else comes in between
        marks = [token for token in side if token in (BOS, EOS)]
        assert marks == [BOS, EOS] * (len(marks) // 2)
        assert not side or (side[0], side[-1]) == (BOS, EOS)
    assert (split.record.sides["train"].documents, split.record.sides["held_out"].documents) == (ours.count(BOS), theirs.count(BOS))


def test_a_text_is_held_out_wherever_it_stands(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(200)]
    forth = pack(tmp_path / "forth", [Passage(text) for text in texts], held_out=0.25)
    back = pack(tmp_path / "back", [Passage(text) for text in [*texts[::-1], *texts]], held_out=0.25)
    held = [{TOKENIZER.decode(ids) for ids in _documents(tokens(made, "held_out"))} for made in (forth, back)]
    assert held[0] == held[1]
    assert 20 < len(held[0]) < 80
    assert not held[1] & {TOKENIZER.decode(ids) for ids in _documents(tokens(back))}


def _documents(ids: list[int]) -> list[list[int]]:
    ends = [place for place, token in enumerate(ids) if token == EOS]
    return [ids[start + 1 : end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def test_no_more_is_read_than_the_training_needs(tmp_path: Path) -> None:
    read: list[int] = []

    def passages() -> object:
        for number in range(10_000):
            read.append(number)
            yield Passage(f"text number {number}")

    made = pack_text(passages(), TOKENIZER, VOCABULARY, training_cut(spec(steps=2)), tmp_path / "pack")  # type: ignore[arg-type]
    assert 64 <= made.record.sides["train"].tokens < 128
    assert len(read) < 1000


@given(num=st.integers(1, 40), seed=st.integers(0, 100), start=st.integers(0, 100), length=st.integers(0, 100))
def test_an_order_has_every_block_once_a_turn_and_needs_no_history(num: int, seed: int, start: int, length: int) -> None:
    order = Order(num, seed)
    everything = order.blocks(0, 5 * num)
    assert all(sorted(everything[turn * num : (turn + 1) * num]) == list(range(num)) for turn in range(5))
    assert Order(num, seed).blocks(start, start + length) == order.blocks(0, start + length)[start:]


def test_turns_and_seeds_differ() -> None:
    orders = [Order(50, seed).blocks(turn * 50, turn * 50 + 50) for seed in (0, 1) for turn in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    ("passages", "words"),
    [([], "holds no text"), ([Passage("abc")], "5 tokens to train on.* one context of 8")],
)
def test_too_little_text_is_refused_and_leaves_nothing(tmp_path: Path, passages: list[Passage], words: str) -> None:
    with pytest.raises(DataError, match=words):
        pack(tmp_path, passages)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_embedding_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a token \d+, and the embedding only 5 rows"):
        pack(tmp_path, [Passage("abcdefghijk")], vocabulary=5)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    made = pack(tmp_path, [Passage("a" * 20)])
    (made.folder / "pack.json").write_text("{")
    with pytest.raises(RunError, match="not readable packed text"):
        Pack.open(made.folder)
