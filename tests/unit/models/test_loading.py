"""Loading models, tokenizers and single tensors, held against plain transformers and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BOS, DEEP_FAMILIES, EOS, PAD, save_tiny, tiny_model
from transformers import PreTrainedModel

from transplant_ray.errors import CheckpointError, DeviceError, NumericsError
from transplant_ray.models import loading
from transplant_ray.models.checkpoint import SINGLE, Checkpoint, open_checkpoint
from transplant_ray.models.loading import (
    OF_THE_DEVICE,
    check_devices,
    check_finite,
    load_model,
    load_tensors,
    load_tokenizer,
    placement,
)

Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(save_tiny(tmp_path / "llama")))


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(save_tiny(tmp_path / "sharded", shard="20KB")))


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, torch.Tensor]], object]) -> Checkpoint:
    path = checkpoint.fetch() / SINGLE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return open_checkpoint(checkpoint.model)


# -- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_a_model_is_loaded_whole_from_any_number_of_shards(family: str, shard: str, tmp_path: Path) -> None:
    model = load_model(open_checkpoint(str(save_tiny(tmp_path, family, shard=shard))), "float32")
    expected = tiny_model(family).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_model_is_ready_to_be_run_and_not_to_be_trained(llama: Checkpoint) -> None:
    model = load_model(llama, "float32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_once_to_the_dtype_asked_for(dtype: str, llama: Checkpoint) -> None:
    expected = tiny_model("llama").state_dict()
    for name, tensor in load_model(llama, dtype).state_dict().items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))


def test_a_missing_tensor_is_refused_by_name_and_not_made_up(llama: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, e.g. {Q}. Download it again"):
        load_model(rewrite(llama, lambda tensors: tensors.pop(Q)), "float32")


def test_a_tensor_of_another_shape_is_refused(llama: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(rewrite(llama, lambda tensors: tensors.update({Q: torch.zeros(3, 3)})), "float32")


@pytest.mark.parametrize("error", OF_THE_DEVICE)
def test_a_device_that_cannot_take_a_model_is_no_fault_of_the_checkpoint(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error("CUDA out of memory" if error is torch.OutOfMemoryError else "an illegal memory access was encountered")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", fails)
    with pytest.raises(DeviceError, match=r"the device cannot take it: .*memory"):
        load_model(llama, "float32")


def test_a_device_that_does_not_compute_any_more_is_said_and_one_without_memory_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    check_devices("cpu", torch.device("cpu"))
    for error, sick in ((torch.AcceleratorError("unspecified launch failure"), True), (torch.OutOfMemoryError("none left"), False)):
        monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
        with pytest.raises(DeviceError, match="cpu no longer computes: unspecified") if sick else nullcontext():
            check_devices("cpu")


def test_files_that_went_away_after_the_comparison_are_an_error_with_the_place(llama: Checkpoint) -> None:
    (llama.fetch() / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"{llama.model}: cannot be loaded.*{SINGLE}"):
        load_model(llama, "float32")
    with pytest.raises(CheckpointError, match=rf"{llama.model}: {SINGLE} has gone or changed"):
        load_tensors(llama, [Q])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_number_that_is_none_is_refused_with_the_name_of_its_tensor(name: str, value: float, llama: Checkpoint) -> None:
    broken = rewrite(llama, lambda tensors: tensors[name].view(-1)[:2].fill_(value))
    with pytest.raises(NumericsError, match=rf"{name} holds 2 NaN or infinite values as float32.*download it again"):
        load_model(broken, "float32")
    with pytest.raises(NumericsError, match=rf"{name} holds 2 NaN or infinite values"):
        load_tensors(broken, [name])
    assert load_tensors(broken, [UP]).keys() == {UP}


def test_a_dtype_too_narrow_for_the_weights_is_said_to_be_one(llama: Checkpoint) -> None:
    large = rewrite(llama, lambda tensors: tensors[Q].view(-1)[:1].fill_(1e6))
    assert load_model(large, "bfloat16") is not None
    for load in (lambda: load_model(large, "float16"), lambda: load_tensors(large, [Q], torch.float16)):
        with pytest.raises(NumericsError, match=r"1 NaN or infinite values as float16.*choose another `resources.dtype`"):
            load()


def test_whole_numbers_are_always_finite() -> None:
    check_finite("any", {"positions": torch.arange(4), "mask": torch.ones(2, dtype=torch.bool)})


@pytest.mark.parametrize(("gpus", "visible", "place"), [
    (0, False, "cpu"), (0, True, "cpu"), (1, False, "cpu"), (0.25, True, "cuda:0"), (1, True, "cuda:0"), (2, True, "balanced"),
])  # fmt: skip
def test_a_model_goes_where_its_gpus_are(gpus: float, visible: bool, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    assert placement(gpus) == place


# -- single tensors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every tensor that is read, as (file, name)."""
    read: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, path: Path, **options: Any) -> None:
            self.path, self.file = path, safe_open(path, **options)

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append((self.path.name, name))
            return self.file.get_tensor(name)

    monkeypatch.setattr(loading, "safe_open", Recorder)
    return read


def test_only_the_tensors_asked_for_are_read_and_from_their_own_shards(sharded: Checkpoint, reads: list[tuple[str, str]]) -> None:
    tensors = load_tensors(sharded, [UP, Q])
    assert sorted(reads) == sorted((sharded.tensors[name].file, name) for name in (Q, UP))
    assert len({file for file, _ in reads}) == 2
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in (Q, UP))


def test_no_names_read_nothing(sharded: Checkpoint, reads: list[tuple[str, str]]) -> None:
    assert (load_tensors(sharded, []), reads) == ({}, [])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_as_stored_or_in_the_dtype_asked_for(stored: torch.dtype, tmp_path: Path) -> None:
    expected = tiny_model("llama", dtype=stored)
    expected.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(load_tensors(checkpoint, [Q])[Q], expected.state_dict()[Q])
    assert load_tensors(checkpoint, [Q])[Q].dtype == stored
    assert torch.equal(load_tensors(checkpoint, [Q], torch.float64)[Q], expected.state_dict()[Q].double())


# -- tokenizers --------------------------------------------------------------------------------------------------------------


def without_tokens(checkpoint: Checkpoint, *tokens: str, **added: str) -> Checkpoint:
    path = checkpoint.fetch() / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in tokens} | added))
    return checkpoint


def test_padding_goes_to_the_left_and_is_masked(llama: Checkpoint) -> None:
    batch = load_tokenizer(llama)(["ab", "abcd"], padding=True)
    assert [row[:2] for row in batch["input_ids"]] == [[PAD, PAD], [BOS, 3]]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("missing", "pad"), [
    ([], PAD), (["pad_token"], EOS), (["pad_token", "eos_token"], BOS),
])  # fmt: skip
def test_a_missing_pad_token_becomes_the_end_or_else_the_unknown_token(missing: list[str], pad: int, llama: Checkpoint) -> None:
    tokenizer = load_tokenizer(without_tokens(llama, *missing, unk_token="<s>"))
    assert tokenizer.pad_token_id == pad
    assert tokenizer(["ab", "abcd"], padding=True)["input_ids"][0][:2] == [pad, pad]


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(llama: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="no pad, end or unknown token to pad with"):
        load_tokenizer(without_tokens(llama, "pad_token", "eos_token", "unk_token"))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BROKEN: dict[str, Callable[[Path], object]] = {
    "no tokenizer": lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    "not JSON": lambda f: (f / "tokenizer.json").write_text("{"),
    "empty": lambda f: (f / "tokenizer.json").write_text("{}"),
    "not text": lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"),
    "unknown algorithm": lambda f: change_json(f / "tokenizer.json", lambda t: t["model"].update(type="Nonesuch")),
    "vocabulary is a list": lambda f: change_json(f / "tokenizer.json", lambda t: t["model"].update(vocab=[1])),
    "config is not JSON": lambda f: (f / "tokenizer_config.json").write_text("{"),
    "config is a list": lambda f: (f / "tokenizer_config.json").write_text("[]"),
    "class is a number": lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": 3}'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_an_error_that_names_the_checkpoint(name: str, llama: Checkpoint) -> None:
    BROKEN[name](llama.fetch())
    with pytest.raises(CheckpointError, match=rf"{llama.model}: its tokenizer cannot be loaded: \S+"):
        load_tokenizer(llama)
