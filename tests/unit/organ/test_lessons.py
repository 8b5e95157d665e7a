"""A lesson is trained, shipped and measured once; stopped it goes on, and what diverges is learnt with its reason."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest
import torch
from stacks import Pair, load, make_pair
from tiny import VOCABULARY, tiny_tokenizer
from trainings import make_pack, sums, training_spec

from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.loading import load_model
from transplant_ray.organ import resident
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Mode, Placement, plan_insertion
from transplant_ray.organ.learners import FullLearner, Learner, OrganLearner
from transplant_ray.organ.lessons import CHECKPOINT, CLOCK, LEARNT, SHIPPED, Learnt, Lesson, carry_out, read_learnt
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.pack import Pack, measuring_cut, pack_text
from transplant_ray.organ.text import Passage
from transplant_ray.organ.training import CPU, Point
from transplant_ray.recipe import MeasuredSpec

SIDES = ("select", "test")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, spec = tmp_path_factory.mktemp("texts"), training_spec()
    measured = MeasuredSpec(data=("x",), contexts=4)
    make_pack(folder / "text", spec)
    for seed, text in ((5, "domain"), (6, "general")):
        pack_text(map(Passage, sums(60, seed)), tiny_tokenizer(), VOCABULARY, measuring_cut(measured, 16), folder / text)
    return {text: folder / text for text in ("text", "domain", "general")}


def lesson(learner: Learner | None, pair: Pair, texts: dict[str, Path], folder: Path, **changes: Any) -> Lesson:
    stage = changes.pop("stage", "confirm")
    return Lesson(
        key="k",
        model="m",
        method=learner.method if learner is not None else "before",
        stage=stage,
        recipient=pair.recipient,
        learner=learner,
        spec=training_spec(**{"steps": 6, "checkpoint_every": 2, **changes}),
        text=texts["text"],
        measured={text: texts[text] for text in ("domain", "general")},
        folder=folder,
        keep=stage == "confirm",
    )


def learn(lesson: Lesson) -> tuple[list[Point], Learnt]:
    """The points of its training, and what was learnt."""
    *points, learnt = carry_out(lesson, CPU)
    assert isinstance(learnt, Learnt)
    return [point for point in points if isinstance(point, Point)], learnt


def test_what_is_measured_is_what_was_shipped(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    _, learnt = learn(lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "a"))
    model = load(tmp_path / "a" / SHIPPED)
    for text in ("domain", "general"):
        blocks = Pack.open(texts[text]).side("test")
        assert learnt.test[text] == pytest.approx(list(block_losses(model, blocks, range(blocks.num), 4)), rel=1e-6)
    assert learnt.bytes == sum(path.stat().st_size for path in (tmp_path / "a" / SHIPPED).rglob("*") if path.is_file())
    assert learnt.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert learnt.tokens == 6 * 4 * 16
    assert [point.step for point in learnt.curve][-1] == 6
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LEARNT, SHIPPED]


def test_the_site_of_an_organ_is_the_best_on_select_and_test_is_opened_there_alone(
    llama: Pair, texts: dict[str, Path], tmp_path: Path
) -> None:
    organ = open_organ(extract_organ(llama.recipient, "1-3", tmp_path / "organ"))
    _, learnt = learn(lesson(OrganLearner(llama.recipient, organ), llama, texts, tmp_path / "a"))
    best = min(learnt.sites, key=lambda site: site.loss or 0)
    assert len(learnt.sites) == 7 + 4
    assert (learnt.select, learnt.site) == (best.loss, f"{best.mode} at {best.at}")
    assert {len(losses) for losses in learnt.test.values()} == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_of_an_organ_at_every_site_is_the_written_checkpoint_bit_for_bit(
    texts: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    pair = make_pair(tmp_path, dtype=dtype)
    organ = open_organ(extract_organ(pair.recipient, "1-3", tmp_path / "own"))
    _, learnt = learn(lesson(OrganLearner(pair.recipient, organ), pair, texts, tmp_path / "a"))
    shipped, blocks = open_organ(tmp_path / "a" / SHIPPED), {side: Pack.open(texts["domain"]).side(side) for side in SIDES}
    for number, site in enumerate(learnt.sites):
        insertion = plan_insertion(pair.recipient, [Placement(shipped, site.at)], cast(Mode, site.mode))
        model = load_model(open_checkpoint(str(write_insertion(insertion, tmp_path / f"{number}"))), "float32")
        assert site.loss == fmean(block_losses(model, blocks["select"], range(blocks["select"].num), 4))
        if f"{site.mode} at {site.at}" == learnt.site:
            assert learnt.test["domain"] == tuple(block_losses(model, blocks["test"], range(blocks["test"].num), 4))


def test_what_is_shipped_is_read_once_however_many_sites_there_are(
    llama: Pair, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organ, read = open_organ(extract_organ(llama.recipient, "1-3", tmp_path / "organ")), Counter[str]()
    real = resident.load_tensors

    def counted(origin: Checkpoint, names: list[str], *rest: Any) -> dict[str, torch.Tensor]:
        read.update(f"{origin.model} {name}" for name in names)
        return real(origin, names, *rest)

    monkeypatch.setattr(resident, "load_tensors", counted)
    learn(lesson(OrganLearner(llama.recipient, organ), llama, texts, tmp_path / "a"))
    assert read
    assert set(read.values()) == {1}


def test_what_only_tunes_is_not_measured_on_test_and_ships_nothing(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    _, learnt = learn(lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "a", stage="tune"))
    assert learnt.test == {}
    assert learnt.select is not None
    assert [path.name for path in (tmp_path / "a").iterdir()] == [LEARNT]


def test_it_is_carried_out_once(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    asked = lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "a")
    _, first = learn(asked)
    assert learn(asked) == ([], first)
    assert first == Learnt.from_json(json.loads(json.dumps(first.to_json())))
    assert read_learnt(replace(asked, key="other")) is None
    (tmp_path / "a" / LEARNT).write_text("{")
    assert read_learnt(asked) is None


def test_stopped_it_goes_on_and_ends_with_the_same_weights(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    calm = lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "calm")
    stopped = replace(calm, folder=tmp_path / "stopped")
    _, expected = learn(calm)
    going = carry_out(stopped, CPU)
    while not (isinstance(point := next(going), Point) and point.step == 5):
        pass
    del going  # stopped between two steps
    assert list((tmp_path / "stopped").glob(f"{CHECKPOINT}*"))
    points, found = learn(stopped)
    assert min(point.step for point in points) > 2  # nothing before the last checkpoint
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    for path in (tmp_path / "calm" / SHIPPED).glob("*.safetensors"):
        assert (tmp_path / "stopped" / SHIPPED / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", ["", "12.", "[]", None], ids=["empty", "cut off", "no number", "gone"])
def test_a_checkpoint_whose_clock_is_damaged_is_not_gone_on_from(
    llama: Pair, texts: dict[str, Path], tmp_path: Path, content: str | None
) -> None:
    asked = lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "a")
    going = carry_out(asked, CPU)
    while not (isinstance(point := next(going), Point) and point.step == 5):
        pass
    del going
    for place in asked.folder.glob(f"{CHECKPOINT}*"):
        (place / CLOCK).unlink()
        if content is not None:
            (place / CLOCK).write_text(content)
    points, learnt = learn(asked)
    assert points[0].step < 2
    assert learnt.error is None
    assert learnt.seconds > 0


def test_what_diverges_is_learnt_with_its_reason(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    asked = lesson(FullLearner(llama.recipient), llama, texts, tmp_path / "a", lr=1e30, steps=20)
    _, learnt = learn(asked)
    assert learnt.error is not None
    assert learnt.select is None
    assert "diverged" in learnt.error or "NaN or infinite" in learnt.error
    assert read_learnt(asked) == learnt
    assert [path.name for path in (tmp_path / "a").iterdir()] == [LEARNT]


def test_the_recipient_as_it_is_is_measured_and_not_trained(llama: Pair, texts: dict[str, Path], tmp_path: Path) -> None:
    _, learnt = learn(lesson(None, llama, texts, tmp_path / "a", stage="before"))
    model = load(llama.recipient.folder)
    blocks = Pack.open(texts["general"]).side("test")
    assert learnt.test["general"] == pytest.approx(list(block_losses(model, blocks, range(blocks.num), 4)))
    assert (learnt.lr, learnt.seed, learnt.parameters, learnt.bytes) == (None, None, 0, 0)
    assert learnt.select is not None
    assert isfinite(learnt.select)
    assert torch.is_grad_enabled()
