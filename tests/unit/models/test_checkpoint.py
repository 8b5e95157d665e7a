"""Opening a checkpoint folder: what is read, and everything that is refused at the door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EOS, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, BertConfig, T5Config

from transplant_ray.errors import CheckpointError, RecipeError
from transplant_ray.models.catalogue import read_catalogue
from transplant_ray.models.checkpoint import INDEX, SINGLE, Checkpoint, at_hand, open_checkpoint, read_generation_ends

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("single"), "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sharded"), "llama", shard="20KB")


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_config(change: dict[str, Any]) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(change))


def point_first_tensor_to(file: object) -> Damage:
    def damage(folder: Path) -> None:
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({min(index["weight_map"]): file}))

    return damage


def test_a_checkpoint_knows_every_tensor_of_its_files(single: Path, sharded: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in tiny_model("llama").state_dict().items()}
    one, many = open_checkpoint(str(single)), open_checkpoint(str(sharded))
    assert {name: info.shape for name, info in one.tensors.items()} == expected
    assert {name: info.shape for name, info in many.tensors.items()} == expected
    assert one.weight_files() == (SINGLE,)
    assert many.weight_files() == tuple(sorted(path.name for path in sharded.glob("*.safetensors")))
    assert len(many.weight_files()) > 2
    assert one.num_parameters == many.num_parameters == sum(p.numel() for p in tiny_model("llama").parameters())


def test_sharded_tensors_lie_where_the_header_says(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    for file in checkpoint.weight_files():
        content, stored = (sharded / file).read_bytes(), load_file(sharded / file)
        for name, tensor in stored.items():
            info = checkpoint.tensors[name]
            assert content[info.start : info.start + info.num_bytes] == tensor.numpy().tobytes()


def test_of_two_sets_of_weights_the_one_that_transformers_loads_is_read(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path)
    save_file({name: t + 1 for name, t in tiny_model("llama").state_dict().items()}, folder / SINGLE, {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    name = "model.layers.0.mlp.up_proj.weight"
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(load_file(folder / checkpoint.tensors[name].file)[name], loaded)


# -- refusals: what is done to a good folder, and the words of the message -------------------------------------------------

FOLDER: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json cannot be read"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{model_type: llama}"), r"config.json.*not a valid JSON"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), r"config.json.*not a valid JSON"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00{"), r"config.json cannot be read"),
    "config is null": (lambda f: (f / "config.json").write_text("null"), r"config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json cannot be read.*model_type"),
    "config is deep": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), r"config.json cannot be read"),
    "unknown family": (edit_config({"model_type": "nonesuch"}), r"model type `nonesuch`.*accept: \[remote_code\]"),
    "code of its own": (edit_config({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}), r"accept: \[remote_code\]"),
    "family is a number": (edit_config({"model_type": 7}), r"config.json cannot be read"),
    "text for a size": (edit_config({"hidden_size": "32"}), r"config.json cannot be read.*'hidden_size' expected int, got str"),
    "null for a size": (edit_config({"vocab_size": None}), r"config.json cannot be read.*'vocab_size' expected int"),
    "no heads": (edit_config({"num_attention_heads": 0}), r"config.json cannot be read"),
    "heads do not divide": (edit_config({"num_attention_heads": 5}), r"config.json cannot be read.*multiple"),
    "positions are text": (edit_config({"rope_parameters": "long"}), r"config.json cannot be read.*rope_parameters"),
    "dtype is a list": (edit_config({"dtype": []}), r"config.json cannot be read"),
    "encoder": (lambda f: BertConfig().save_pretrained(f), r"bert is not a decoder\. Expected a causal language model"),
    "encoder and decoder": (lambda f: T5Config().save_pretrained(f), r"t5 is not a decoder"),
    "quantised": (edit_config({"quantization_config": {"quant_method": "gptq", "bits": 4}}), r"quantised.*full-precision"),
    "no weights": (lambda f: (f / SINGLE).unlink(), rf"neither {SINGLE} nor {INDEX} is there"),
    "only pickle": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), r"only pickle.*pytorch_model.bin.*accept: \[pickle\]"),
    "corrupt weights": (lambda f: (f / SINGLE).write_bytes(b"\x08" + bytes(15)), r"header is corrupt.*Download it again"),
    "truncated weights": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-1]), r"truncated.*Download it again"),
    "a git pointer for weights": (lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec"), r"not safetensors"),
}


@pytest.mark.parametrize("name", FOLDER)
def test_a_folder_that_cannot_be_read_is_refused_with_its_reason(name: str, single: Path, tmp_path: Path) -> None:
    damage, words = FOLDER[name]
    folder = copy_of(single, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as raised:
        open_checkpoint(str(folder))
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 800


INDEXES: dict[str, tuple[Damage, str]] = {
    "not JSON": (lambda f: (f / INDEX).write_text("{"), "not a shard index"),
    "no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), "not a shard index"),
    "deep": (lambda f: (f / INDEX).write_text("[" * 100_000), "not a shard index"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "no `weight_map`"),
    "no map": (lambda f: (f / INDEX).write_text('{"metadata": {}}'), "no `weight_map`"),
    "empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "no `weight_map`"),
    "map is a list": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "no `weight_map`"),
    "missing shard": (lambda f: first_shard(f).unlink(), r"shard 'model-00001-of-.*' is missing"),
    "folder for a shard": (lambda f: _folder_for(first_shard(f)), r"shard 'model-00001-of-.*' is missing"),
    "truncated shard": (lambda f: first_shard(f).write_bytes(bytes(9)), r"model-00001-of-.*(truncated|corrupt)"),
    "leaves the folder": (point_first_tensor_to("../x.safetensors"), r"'../x.safetensors'; a shard is .* in the same folder"),
    "absolute": (point_first_tensor_to("/etc/x.safetensors"), r"'/etc/x.safetensors'; a shard is"),
    "in a folder": (point_first_tensor_to("sub/x.safetensors"), r"'sub/x.safetensors'; a shard is"),
    "a number": (point_first_tensor_to(3), r"points to 3; a shard is"),
    "null": (point_first_tensor_to(None), r"points to None; a shard is"),
    "no name": (point_first_tensor_to(""), r"points to ''; a shard is"),
    "the folder": (point_first_tensor_to(".."), r"points to '..'; a shard is"),
    "pickle shard": (point_first_tensor_to("pytorch_model.bin"), r"'pytorch_model.bin'; a shard is"),
    "a name too long": (point_first_tensor_to("x" * 5000 + ".safetensors"), r"is missing"),
    "a name that no file has": (point_first_tensor_to("x\0.safetensors"), r"'x\\x00.safetensors' is missing"),
    "half a character": (point_first_tensor_to("\ud800.safetensors"), r"'\\ud800.safetensors' is missing"),
    "tensor not in its shard": (
        lambda f: edit_json(f / INDEX, lambda index: index["weight_map"].update(ghost=first_shard(f).name)),
        r"ghost is not in model-00001-of-.* \(1 such tensors\)",
    ),
}  # fmt: skip


def _folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_cannot_be_followed_is_refused_with_its_reason(name: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = INDEXES[name]
    folder = copy_of(sharded, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as raised:
        open_checkpoint(str(folder))
    assert str(folder) in str(raised.value)
    str(raised.value).encode()  # it can be printed


def test_a_shard_outside_the_folder_is_refused_even_where_it_is_there(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path)
    shutil.copyfile(first_shard(folder), tmp_path / "secret.safetensors")
    point_first_tensor_to("../secret.safetensors")(folder)
    with pytest.raises(CheckpointError, match="same folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("place", ["missing/folder/here", "./missing", "~/missing"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder\. Give a folder with config.json and safetensors, or a hub id"):
        open_checkpoint(place)


def test_a_file_is_not_a_folder(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a folder. Expected a folder with config.json"):
        open_checkpoint(str(single / SINGLE))


def test_a_revision_of_a_local_folder_is_refused(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`revision: main` has no effect on a local folder. Remove it."):
        open_checkpoint(str(single), "main")


def test_an_unknown_zoo_name_is_refused_with_the_pairs() -> None:
    with pytest.raises(RecipeError, match=r"zoo:nonesuch: the zoo has no such file. Pairs are cross-generation, base-instruct"):
        open_checkpoint("zoo:nonesuch")


def test_a_decoder_bert_is_not_an_encoder(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 46}
    AutoModelForCausalLM.from_config(BertConfig(**small, is_decoder=True)).save_pretrained(tmp_path)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path)))
    assert (catalogue.guessed, catalogue.num_layers) == (True, 2)


# -- end tokens --------------------------------------------------------------------------------------------------------------


def with_generation(folder: Path, text: str | None) -> Checkpoint:
    tiny_config("llama").save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / SINGLE)
    if text is not None:
        (folder / "generation_config.json").write_text(text)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("text", "ends"), [('{"eos_token_id": [1, 5]}', [1, 5]), ('{"eos_token_id": 0}', 0), ("{}", EOS), (None, EOS)]
)
def test_end_tokens_come_from_the_generation_config_or_else_the_config(text: str | None, ends: object, tmp_path: Path) -> None:
    assert read_generation_ends(with_generation(tmp_path, text)) == ends


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, "x"]}', '{"eos_token_id": true}']
)
def test_a_broken_generation_config_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_ends(with_generation(tmp_path, text))


def test_a_checkpoint_with_a_home_is_read_from_there_whatever_lies_in_its_folder(tmp_path: Path) -> None:
    """On another node the folder may be there, of another run."""
    for name, seed in (("made", 1), ("stale", 2)):
        tiny_model("llama", seed).save_pretrained(tmp_path / name)
    made = open_checkpoint(str(tmp_path / "made"))
    with at_hand(replace(made, folder=tmp_path / "stale", home=f"file://{tmp_path}/made")) as checkpoint:
        assert checkpoint.folder is not None
        name = made.weight_files()[0]
        assert (checkpoint.folder / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert not checkpoint.folder.exists()
    with at_hand(made) as same:
        assert same is made


def test_a_folder_is_found_from_elsewhere_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors run in a folder of Ray's."""
    save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("model")
    assert (checkpoint.model, checkpoint.folder) == ("model", tmp_path / "model")
