"""The grid of an organ sweep, its controls, and the models that are made of resident layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import Pair, load, logits, make_pair, save_model, trained_copy
from torch import nn

from transplant_ray.errors import IncompatibleModels, OrganError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.loading import load_model
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.grid import Grid, plan_grid
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.resident import Resident
from transplant_ray.organ.untrained import OWN, find_untrained
from transplant_ray.recipe import PlacesSpec

FAMILIES = ("gpt2", "llama", "gemma2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = make_pair(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def pair(pairs: Callable[[str], Pair]) -> Pair:
    return pairs("llama")


def plan(
    pair: Pair, organs: dict[str, Organ] | None = None, untrained: dict[str, Organ | str] | None = None, **places: Any
) -> Grid:
    return plan_grid(pair.recipient, organs or {"a": pair.organ}, PlacesSpec(**places), untrained=untrained or {})


def test_every_organ_is_at_every_place_in_every_mode(pair: Pair) -> None:
    grid = plan(pair)
    places = [(trial.mode, trial.at) for trial in grid.of("trial")]
    assert places == [*(("insert", at) for at in range(7)), *(("replace", at) for at in range(4))]
    assert [trial.role for trial in grid.trials][:1] == ["recipient"]
    assert [trial.label for trial in grid.of("alone")] == ["a alone"]
    assert {len(trial.insertion.layers) for trial in grid.of("trial")} == {6, 9}
    assert {trial.num_put for trial in grid.of("trial")} == {3}
    assert grid.misfits == ()


def test_ids_are_of_layers_and_nothing_else(pair: Pair) -> None:
    once, twice = plan(pair), plan(pair, {"a": pair.organ, "b": pair.organ})
    assert len({trial.id for trial in once.trials}) == len(once.trials) == once.num_models
    assert twice.num_models == once.num_models
    assert {trial.id for trial in twice.trials} == {trial.id for trial in once.trials}


def test_parameters_are_those_of_the_loaded_model(pair: Pair, tmp_path: Path) -> None:
    for number, trial in enumerate(plan(pair, positions=(1,)).of("trial")):
        model = load(write_insertion(trial.insertion, tmp_path / str(number)))
        assert trial.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_point_that_does_not_fit_is_told_and_the_others_stay(pair: Pair) -> None:
    grid = plan(pair, positions=(1, 5))
    assert [(trial.mode, trial.at) for trial in grid.of("trial")] == [("insert", 1), ("insert", 5), ("replace", 1)]
    (misfit,) = grid.misfits
    assert (misfit.mode, misfit.at) == ("replace", 5)
    assert "expected 0 to 3" in misfit.reason


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"positions": (0, 7)}, "`sweep.positions`: position 7: the recipient has 6 layers"),
        ({"positions": (4,)}, "organ a can be put nowhere with `replace`: position 4"),
    ],
)
def test_what_fits_nowhere_is_an_error(pair: Pair, places: dict[str, Any], words: str) -> None:
    with pytest.raises(OrganError, match=words):
        plan(pair, **places)


def test_an_organ_longer_than_the_recipient_cannot_replace(pair: Pair, tmp_path: Path) -> None:
    short = open_checkpoint(str(save_model(tmp_path / "short", num_hidden_layers=2)))
    with pytest.raises(OrganError, match=r"put nowhere with `replace`.*it does not fit anywhere"):
        plan(replace(pair, recipient=short))
    assert len(plan(replace(pair, recipient=short), modes=("insert",)).of("trial")) == 3


def test_an_organ_of_another_width_is_named(pair: Pair, tmp_path: Path) -> None:
    wide = open_checkpoint(str(save_model(tmp_path / "wide", hidden_size=64, num_attention_heads=8)))
    with pytest.raises(IncompatibleModels, match=r"`organs.a`: [\s\S]*hidden_size"):
        plan(replace(pair, recipient=wide))


def test_layers_that_compute_by_their_index_go_nowhere_else(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True)
    grid = plan(pair, modes=("replace",))
    assert [trial.at for trial in grid.of("trial")] == [1]
    assert [misfit.at for misfit in grid.misfits] == [0, 2, 3]
    assert grid.of("alone") == []
    assert "another index" in grid.without["a"]


# -- untrained layers --------------------------------------------------------------------------------------------------------


def test_the_layers_of_before_are_found_in_the_source_and_proven(pair: Pair, tmp_path: Path) -> None:
    organ = trained_copy(pair.organ, tmp_path / "trained")
    found = find_untrained(organ, pair.recipient, tmp_path / "search")
    assert isinstance(found, Organ)
    assert found.manifest.weights == pair.organ.manifest.weights
    grid = plan(pair, {"a": organ, "before": pair.organ}, {"a": found, "before": OWN}, positions=(2,), modes=("insert",))
    (control,) = grid.of("untrained")
    assert grid.untrained(grid.trial("a insert 2")) is control
    assert grid.untrained(grid.trial("before insert 2")) is None
    assert control.id == grid.trial("before insert 2").id != grid.trial("a insert 2").id
    assert grid.without == {"before": OWN}


def test_a_recipient_that_has_moved_is_still_the_source(pair: Pair, tmp_path: Path) -> None:
    organ = trained_copy(open_organ(extract_organ(pair.recipient, "1-3", tmp_path / "cut")), tmp_path / "trained")
    moved = open_checkpoint(str(Path(pair.recipient.folder or "").rename(tmp_path / "moved")))
    try:
        found = find_untrained(organ, moved, tmp_path / "search")
    finally:
        (tmp_path / "moved").rename(Path(pair.recipient.folder or ""))
    assert isinstance(found, Organ)


def test_one_that_was_trained_twice_goes_back_to_the_first(pair: Pair, tmp_path: Path) -> None:
    first = trained_copy(pair.organ, tmp_path / "first")
    second = trained_copy(first, tmp_path / "second", earlier=first.manifest.training)
    found = find_untrained(second, pair.recipient, tmp_path / "search")
    assert isinstance(found, Organ)
    assert found.manifest.weights == pair.organ.manifest.weights


def test_nobody_has_what_cannot_be_proven(pair: Pair, tmp_path: Path) -> None:
    assert find_untrained(pair.organ, pair.recipient, tmp_path) == OWN
    other = trained_copy(pair.organ, tmp_path / "other", before="0" * 64)
    assert "not those of before" in str(find_untrained(other, pair.recipient, tmp_path / "a"))
    said = json.loads((tmp_path / "other" / "organ.json").read_text())
    gone = replace(
        other, manifest=other.manifest.model_copy(update={"source": other.manifest.source.model_copy(update={"model": "/gone"})})
    )
    assert said["source"]["model"] != "/gone"
    assert "its source /gone cannot be opened" in str(find_untrained(gone, pair.recipient, tmp_path / "b"))


# -- resident models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resident_model_is_the_written_checkpoint_bit_for_bit(pairs: Callable[[str], Pair], family: str, tmp_path: Path) -> None:
    pair, resident = pairs(family), Resident(torch.float32)
    grid = plan(pair, positions=(1,))
    for number, trial in enumerate(grid.of("trial")):
        made = resident.model(trial.insertion)
        written = load_model(open_checkpoint(str(write_insertion(trial.insertion, tmp_path / str(number)))), "float32")
        assert made.config.to_dict().get("layer_types") == written.config.to_dict().get("layer_types")
        assert torch.equal(logits(made), logits(written))
        assert _layer_indices(made) == _layer_indices(written)
    assert torch.equal(logits(resident.model(grid.recipient.insertion)), logits(load(pair.recipient.folder)))


def test_models_of_one_process_share_their_weights(pair: Pair) -> None:
    resident = Resident(torch.float32)
    first, second = (resident.model(trial.insertion) for trial in plan(pair, positions=(0, 4), modes=("insert",)).of("trial"))
    held = {tensor.data_ptr() for tensor in resident.held.values()}
    for model in (first, second):
        assert {parameter.data_ptr() for parameter in model.parameters()} <= held
    assert len(held) < 1.5 * len(list(first.parameters()))


def test_an_organ_is_rounded_as_the_recipients_file_would_round_it(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama")
    half = open_checkpoint(str(save_model(tmp_path / "half", "llama", 2, torch.bfloat16)))
    (trial,) = plan(replace(pair, recipient=half), positions=(2,), modes=("insert",)).of("trial")
    written = load_model(open_checkpoint(str(write_insertion(trial.insertion, tmp_path / "out"))), "float32")
    assert torch.equal(logits(Resident(torch.float32).model(trial.insertion)), logits(written))


def test_alone_an_organ_stands_between_embedding_and_head(pair: Pair) -> None:
    (alone,) = plan(pair).of("alone")
    model, source, recipient = Resident(torch.float32).model(alone.insertion), load(pair.source.folder), load(pair.recipient.folder)
    recipient.model.layers = nn.ModuleList(source.model.layers[1:4])
    for index, layer in enumerate(recipient.model.layers):
        layer.self_attn.layer_idx = index
    recipient.config.num_hidden_layers = 3
    assert torch.equal(logits(model), logits(recipient))


def _layer_indices(model: nn.Module) -> list[int]:
    return [part.layer_idx for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int)]
