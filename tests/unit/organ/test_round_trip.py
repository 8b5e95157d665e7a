"""What is cut out and put in is what plain `transformers` makes of layers moved in memory; taken out, all is as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub import local_hub
from stacks import Origin, Pair, contents, greedy, load, logits, make_pair, restacked, save_model, types_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.header import read_header
from transplant_ray.models.loading import load_tensors
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Insertion, Layer, Mode, Placement, plan_insertion
from transplant_ray.organ.remove import remove_organs


def own(pair: Pair, *layers: int) -> list[Origin]:
    return [(pair.recipient, layer) for layer in layers]


def cut(pair: Pair) -> list[Origin]:
    """What the organ is, of the source's layers."""
    return [(pair.source, layer) for layer in (1, 2, 3)]


def put(pair: Pair, out: Path, *positions: int, mode: Mode = "insert") -> Insertion:
    insertion = plan_insertion(pair.recipient, [Placement(pair.organ, at) for at in positions], mode)
    write_insertion(insertion, out)
    return insertion


def check_as_in_memory(pair: Pair, out: Path, origins: list[Origin]) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(model.eval()), logits(restacked(pair, origins, types_of(origins))))


def test_layers_put_back_where_they_were_change_nothing(pair: Pair, tmp_path: Path) -> None:
    insertion = plan_insertion(pair.source, [Placement(pair.organ, 1)], "replace")
    write_insertion(insertion, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(pair.source.folder)))
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in contents(pair.source.folder)} == contents(pair.source.folder)
    assert insertion.settings == {}


def test_inserted_layers_are_those_of_the_source(pair: Pair, tmp_path: Path) -> None:
    """With a cache too, which every layer finds by its number."""
    put(pair, tmp_path / "out", 2)
    origins = [*own(pair, 0, 1), *cut(pair), *own(pair, 2, 3, 4, 5)]
    check_as_in_memory(pair, tmp_path / "out", origins)
    assert greedy(load(tmp_path / "out")) == greedy(restacked(pair, origins, types_of(origins)))


def test_replaced_layers_are_those_of_the_source(pair: Pair, tmp_path: Path) -> None:
    put(pair, tmp_path / "out", 2, mode="replace")
    check_as_in_memory(pair, tmp_path / "out", [*own(pair, 0, 1), *cut(pair), *own(pair, 5)])


def test_organs_may_come_first_and_last(pair: Pair, tmp_path: Path) -> None:
    put(pair, tmp_path / "out", 0, 6)
    check_as_in_memory(pair, tmp_path / "out", [*cut(pair), *own(pair, *range(6)), *cut(pair)])


def test_positions_count_the_recipients_own_layers(llama: Pair, tmp_path: Path) -> None:
    put(llama, tmp_path / "out", 1, 4)
    check_as_in_memory(llama, tmp_path / "out", [*own(llama, 0), *cut(llama), *own(llama, 1, 2, 3), *cut(llama), *own(llama, 4, 5)])


@pytest.mark.parametrize(("mode", "first", "second"), [("insert", 1, 4), ("replace", 0, 3)])
def test_the_order_in_which_organs_are_given_does_not_matter(
    llama: Pair, tmp_path: Path, mode: Mode, first: int, second: int
) -> None:
    other = open_organ(extract_organ(llama.recipient, "0-2", tmp_path / "other"))
    placements = [Placement(llama.organ, first), Placement(other, second)]
    for name, given in (("a", placements), ("b", placements[::-1])):
        write_insertion(plan_insertion(llama.recipient, given, mode), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    origins = [*cut(llama), *own(llama, 0, 1, 2)]
    if mode == "insert":
        origins = [*own(llama, *range(first)), *cut(llama), *own(llama, *range(first, second)), *own(llama, 0, 1, 2)]
        origins += own(llama, *range(second, 6))
    check_as_in_memory(llama, tmp_path / "a", origins)


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_taken_out_again_the_recipient_is_what_it_was(pair: Pair, tmp_path: Path, mode: Mode) -> None:
    put(pair, tmp_path / "out", 0, 3, mode=mode)
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(pair.recipient.folder)


def in_memory(insertion: Insertion, pair: Pair) -> PreTrainedModel:
    """What an insertion says, without a file being written: its config and its tensors, and all else of the recipient."""
    model = AutoModelForCausalLM.from_config(insertion.config).eval()
    rest = {
        name: value for name, value in load(pair.recipient.folder).state_dict().items() if not name.startswith(f"{pair.layers}.")
    }
    layers = {name: load_tensors(origin, [stored])[stored] for name, origin, stored in insertion.tensors()}
    model.load_state_dict({**rest, **layers}, strict=True)
    return model


def test_a_model_can_be_made_of_the_plan_alone(pair: Pair, tmp_path: Path) -> None:
    insertion = put(pair, tmp_path / "out", 2)
    assert torch.equal(logits(in_memory(insertion, pair)), logits(load(tmp_path / "out")))


def test_an_organ_alone_stands_between_embedding_and_head(pair: Pair) -> None:
    """As it is trained."""
    insertion = plan_insertion(pair.recipient, [Placement(pair.organ, 0)])
    alone = replace(insertion, layers=tuple(Layer(0, index) for index in range(3)))
    origins = cut(pair)
    assert torch.equal(logits(in_memory(alone, pair)), logits(restacked(pair, origins, types_of(origins))))


# -- layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("shard", ["20KB", "60KB"])
def test_shards_keep_their_names_and_come_back(tmp_path: Path, mode: Mode, shard: str) -> None:
    pair = make_pair(tmp_path, shard=shard)
    put(pair, tmp_path / "out", 2, mode=mode)
    check_as_in_memory(pair, tmp_path / "out", [*own(pair, 0, 1), *cut(pair), *own(pair, *range(2 if mode == "insert" else 5, 6))])
    assert open_checkpoint(str(tmp_path / "out")).weight_files() == pair.recipient.weight_files()
    assert len(pair.recipient.weight_files()) > 2
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(pair.recipient.folder)


def test_an_index_counts_what_was_put_in(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, shard="20KB")
    put(pair, tmp_path / "out", 2)
    load(tmp_path / "out").save_pretrained(tmp_path / "again", max_shard_size="20KB")
    metadata = [json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["metadata"] for name in ("out", "again")]
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("bare", ["source", "recipient"])
def test_a_gpt2_saved_from_its_base_class_has_other_names_on_disk_and_works(tmp_path: Path, bare: str) -> None:
    whole = make_pair(tmp_path / "whole", "gpt2")
    folder = tmp_path / "bare"
    load(getattr(whole, bare).folder).transformer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole.source.folder).save_pretrained(folder)
    opened = open_checkpoint(str(folder))
    assert "h.0.attn.c_attn.weight" in opened.tensors
    source, recipient = (opened, whole.recipient) if bare == "source" else (whole.source, opened)
    pair = Pair("gpt2", source, recipient, open_organ(extract_organ(source, "1-3", tmp_path / "organ")))
    assert contents(tmp_path / "organ")["organ.safetensors"] == contents(tmp_path / "whole" / "organ")["organ.safetensors"]
    put(pair, tmp_path / "out", 1)
    reference = restacked(whole, [*own(whole, 0), *cut(whole), *own(whole, 1, 2, 3, 4, 5)])
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(recipient.folder)


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_an_organ_takes_the_dtype_of_its_recipient_and_that_is_said(llama: Pair, tmp_path: Path, mode: Mode) -> None:
    recipient = open_checkpoint(str(save_model(tmp_path / "half", seed=2, dtype=torch.bfloat16)))
    insertion = plan_insertion(recipient, [Placement(llama.organ, 2)], mode)
    write_insertion(insertion, tmp_path / "out")
    assert insertion.warnings == ("the organ is stored as F32 and takes the recipient's BF16",)
    out = load(tmp_path / "out")
    assert {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()} == {"BF16"}
    for ours, theirs in zip(
        out.model.layers[2:5].parameters(), load(llama.source.folder).model.layers[1:4].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(recipient.folder)


def test_organs_are_put_into_what_has_some_and_come_out_one_after_the_other(llama: Pair, tmp_path: Path) -> None:
    put(llama, tmp_path / "one", 1)
    second = Pair("llama", llama.source, open_checkpoint(str(tmp_path / "one")), llama.organ)
    put(second, tmp_path / "two", 1)
    put(Pair("llama", llama.source, open_checkpoint(str(tmp_path / "two")), llama.organ), tmp_path / "three", 2, mode="replace")
    check_as_in_memory(llama, tmp_path / "two", [*own(llama, 0), *cut(llama), *cut(llama), *own(llama, 1, 2, 3, 4, 5)])
    for before, after in (("three", "two"), ("two", "one")):
        remove_organs(tmp_path / before, tmp_path / f"back-{after}")
        assert contents(tmp_path / f"back-{after}") == contents(tmp_path / after)
    remove_organs(tmp_path / "back-one", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(llama.recipient.folder)


def test_a_recipient_on_the_hub_is_fetched_and_comes_back(llama: Pair, tmp_path: Path) -> None:
    with local_hub({"org/recipient": Path(llama.recipient.model)}, tmp_path / "cache"):
        remote = Pair("llama", llama.source, open_checkpoint("org/recipient"), llama.organ)
        put(remote, tmp_path / "remote", 2)
    put(llama, tmp_path / "local", 2)
    told = {"insertion.json", "README.md"}
    remote_files, local_files = (
        {n: c for n, c in contents(tmp_path / place).items() if n not in told} for place in ("remote", "local")
    )
    assert remote_files == local_files
    remove_organs(tmp_path / "remote", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(Path(llama.recipient.model))


def test_a_record_that_lost_what_undoes_it_is_no_hindrance(llama: Pair, tmp_path: Path) -> None:
    """As where a variant was grafted onto a model with organs: its record is copied, and what it kept is not."""
    put(llama, tmp_path / "one", 1)
    shutil.rmtree(tmp_path / "one" / "undo")
    before = contents(tmp_path / "one")
    put(Pair("llama", llama.source, open_checkpoint(str(tmp_path / "one")), llama.organ), tmp_path / "two", 1)
    remove_organs(tmp_path / "two", tmp_path / "back")
    assert contents(tmp_path / "back") == before
