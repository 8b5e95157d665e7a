"""Losses of blocks are those that a model gives itself, however many are read at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stacks import Pair
from tiny import VOCABULARY, tiny_tokenizer
from trainings import sums

from transplant_ray.errors import DataError, ResourceError
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.pack import Pack, measuring_cut, pack_text
from transplant_ray.organ.text import Passage
from transplant_ray.organ.wrapper import load_wrapper
from transplant_ray.recipe import MeasuredSpec


def measured(folder: Path, number: int = 200, contexts: int = 10) -> Pack:
    cut = measuring_cut(MeasuredSpec(data=["x"], contexts=contexts), context=16)
    return pack_text(map(Passage, sums(number)), tiny_tokenizer(), VOCABULARY, cut, folder)


def test_they_are_those_of_the_model_one_by_one(pair: Pair, tmp_path: Path) -> None:
    model, blocks = load_wrapper(pair.recipient, pair.organ).eval(), measured(tmp_path / "pack").side("select")
    indices = [3, 1, 4, 1, 5]
    found = list(block_losses(model, blocks, indices, rows=2))
    for index, loss in zip(indices, found, strict=True):
        ids = blocks.read([index])
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert found == pytest.approx(list(block_losses(model, blocks, indices, rows=64)), rel=1e-5)


def test_no_more_is_packed_of_a_side_than_is_read_and_no_text_is_on_both(tmp_path: Path) -> None:
    pack = measured(tmp_path / "pack")
    for side in pack.record.sides.values():
        assert 10 <= side.blocks <= 13  # the last document is whole
    texts = [set(tiny_tokenizer().decode(pack.side(name).read(range(10)).flatten()).split("</s>")) for name in ("select", "test")]
    assert not texts[0] & texts[1] - {"", " "}


def test_both_halves_need_a_context(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 tokens to (choose by|confirm on).*one context of 16"):
        measured(tmp_path / "pack", number=1)
    assert not (tmp_path / "pack").exists()


def test_memory_that_runs_out_is_said(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = load_wrapper(pair.recipient, pair.organ).eval(), measured(tmp_path / "pack").side("test")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(ResourceError, match=r"out of memory .*fewer blocks"):
        list(block_losses(model, blocks, [0], rows=1))
