"""Each learner trains what it says and nothing else; what it ships gives, by plain libraries, the model that was trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from stacks import Pair, load, logits, make_pair
from trainings import make_pack, training_spec

from transplant_ray.errors import RecipeError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Placement, plan_insertion
from transplant_ray.organ.learners import FullLearner, InPlaceLearner, Learner, LoraLearner, OrganLearner, Site
from transplant_ray.organ.pack import Order, Pack
from transplant_ray.organ.training import CPU, Training

MAPS = {"llama": 7, "gpt2": 4}
"""Linear maps of a layer."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """GPT-2 keeps its maps the other way round, and its head is its embedding."""
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return make_pack(tmp_path_factory.mktemp("pack") / "pack", training_spec())


@pytest.fixture(scope="module")
def learners(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learner]:
    """The organ is layers 1 to 3 of the recipient."""
    organ = open_organ(extract_organ(pair.recipient, "1-3", tmp_path_factory.mktemp("own") / "organ"))
    made = (
        OrganLearner(pair.recipient, organ),
        InPlaceLearner(pair.recipient, organ),
        FullLearner(pair.recipient),
        LoraLearner(pair.recipient, rank=2, alpha=6.0),
    )
    return {learner.method: learner for learner in made}


def trained(learner: Learner, pack: Pack, steps: int = 3, lr: float = 1e-2) -> Training:
    training = Training(learner.load(0), pack, training_spec(steps=steps, lr=lr, held_out=0))
    list(training.run())
    training.model.eval()
    return training


def layer_of(name: str) -> int | None:
    """The layer that a parameter is in, by its name in any of the models."""
    words = name.split(".")
    where = next((words.index(word) for word in ("layers", "h") if word in words), None)
    return None if where is None else int(words[where + 1])


EXPECTED: dict[str, Callable[[str], bool]] = {
    "organ": lambda name: layer_of(name) is not None,
    "in_place": lambda name: layer_of(name) in (1, 2, 3),
    "full": lambda _: True,
    "lora": lambda name: "lora_" in name,
}


@pytest.mark.parametrize("method", EXPECTED)
def test_steps_move_exactly_what_is_to_be_trained(learners: dict[str, Learner], pack: Pack, method: str) -> None:
    model = learners[method].load(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(filter(EXPECTED[method], before))
    training = trained(learners[method], pack)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]) != EXPECTED[method](name) or parameter.grad is not None, name
        if not EXPECTED[method](name):
            assert torch.equal(parameter, before[name]), name
    moved = [name for name in filter(EXPECTED[method], before) if not torch.equal(training.parameters[name], before[name])]
    # tokens and positions that the text does not have stay; whole tensors do not
    assert len(moved) == len(training.parameters)


def test_lora_stands_beside_every_linear_map_of_every_layer(pair: Pair, learners: dict[str, Learner]) -> None:
    model = learners["lora"].load(0)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 6 * MAPS[pair.family]
    assert torch.equal(logits(model), logits(load(pair.recipient.folder)))  # it begins as the recipient


def test_seeds_draw_other_matrices_and_the_same_seed_the_same(learners: dict[str, Learner]) -> None:
    first, again, other = (dict(learners["lora"].load(seed).named_parameters()) for seed in (0, 0, 1))
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("method", ["full", "in_place"])
def test_it_is_a_bare_loop_over_plain_transformers(pair: Pair, learners: dict[str, Learner], pack: Pack, method: str) -> None:
    ours = Training(learners[method].load(0), pack, training_spec(steps=3, held_out=0))
    if pair.family == "gpt2":  # which step draws which dropout is ours
        ours.model.eval()
        ours.model.train = lambda *_: ours.model  # type: ignore[method-assign,assignment,misc]
    list(ours.run())

    model = load(pair.recipient.folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(EXPECTED[method](name))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if (p.dim() > 1) == big], "weight_decay": 0.1 * big} for big in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    flat = np.fromfile(pack.folder / "train.bin", dtype="uint16").astype(np.int64)
    order = Order(pack.train.num, 0).blocks(0, 12)
    for step, rate in enumerate((1.0, 0.55, 0.1)):  # half a cosine over three steps, down to a tenth
        ids = torch.tensor(np.stack([flat[16 * block : 16 * block + 16] for block in order[4 * step : 4 * step + 4]]))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = ours.optimizer.param_groups[0]["lr"] if step == 2 else 1e-2 * rate
        optimizer.step()
        optimizer.zero_grad()
    reference = dict(model.named_parameters())
    assert not [name for name, parameter in ours.parameters.items() if not torch.equal(parameter, reference[name])]


def shipped(learner: Learner, training: Training, folder: Path) -> Path:
    return learner.ship({name: parameter.detach() for name, parameter in training.parameters.items()}, folder, {"steps": 3})


def test_plain_peft_loads_the_adapter(pair: Pair, learners: dict[str, Learner], pack: Pack, tmp_path: Path) -> None:
    training = trained(learners["lora"], pack)
    folder = shipped(learners["lora"], training, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(load(pair.recipient.folder), folder).eval()
    assert torch.equal(logits(plain), logits(training.model))
    assert torch.equal(logits(learners["lora"].recover(folder, CPU)(None)), logits(training.model))
    assert not torch.allclose(logits(training.model), logits(load(pair.recipient.folder)), atol=1e-3)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights < sum(path.stat().st_size for path in pair.recipient.folder.glob("*.safetensors")) / 2  # type: ignore[union-attr]


def test_plain_transformers_load_the_checkpoint(learners: dict[str, Learner], pack: Pack, tmp_path: Path) -> None:
    training = trained(learners["full"], pack)
    folder = shipped(learners["full"], training, tmp_path / "full")
    assert torch.equal(logits(load(folder)), logits(training.model))
    assert (folder / "tokenizer.json").is_file()
    assert open_checkpoint(str(folder)).num_parameters == learners["full"].recipient.num_parameters


def test_what_was_trained_in_place_is_an_organ_that_gives_the_whole_model(
    learners: dict[str, Learner], pack: Pack, tmp_path: Path
) -> None:
    training = trained(learners["in_place"], pack)
    folder = shipped(learners["in_place"], training, tmp_path / "organ")
    assert learners["in_place"].sites(folder) == [Site("replace", 1)]
    assert torch.equal(logits(learners["in_place"].recover(folder, CPU)(Site("replace", 1))), logits(training.model))
    manifest = open_organ(folder).manifest
    assert manifest.training == {"steps": 3}


def test_an_organ_can_go_everywhere_and_comes_as_it_is_written(learners: dict[str, Learner], pack: Pack, tmp_path: Path) -> None:
    learner = learners["organ"]
    folder = shipped(learner, trained(learner, pack), tmp_path / "organ")
    assert [str(site) for site in learner.sites(folder)] == [
        *(f"insert at {at}" for at in range(7)),
        *(f"replace at {at}" for at in range(4)),
    ]
    organ, recovered = open_organ(folder), learner.recover(folder, CPU)
    for site in (Site("insert", 6), Site("replace", 0)):
        insertion = plan_insertion(learner.recipient, [Placement(organ, site.at)], site.mode)
        out = write_insertion(insertion, tmp_path / site.mode)
        assert torch.equal(logits(recovered(site)), logits(load(out)))


def test_a_checkpoint_in_bfloat16_is_shipped_in_it(pack: Pack, tmp_path: Path) -> None:
    stored = make_pair(tmp_path, "llama", dtype=torch.bfloat16).recipient
    training = trained(FullLearner(stored), pack)
    folder = shipped(FullLearner(stored), training, tmp_path / "full")
    assert {info.dtype for info in open_checkpoint(str(folder)).tensors.values()} == {"BF16"}
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}


def test_without_peft_the_extra_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"not installed .*transplant-ray\[lora\]"):
        LoraLearner(pair.recipient, 2, 4.0).load(0)
