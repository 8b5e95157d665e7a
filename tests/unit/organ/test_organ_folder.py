"""An organ that is damaged, tampered with, of another format or not whole is refused at the door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import JSON_TEXTS, Hand, ends_well
from safetensors.torch import load_file, save_file
from stacks import Pair

from transplant_ray.errors import OrganError
from transplant_ray.files import sha256_file
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.manifest import Manifest

Damage = Callable[[Path], object]


def copy_of(pair: Pair, place: Path) -> Path:
    return Path(shutil.copytree(pair.organ.checkpoint.model, place / "copy"))


def edit(change: dict[str, Any]) -> Damage:
    """organ.json changed by somebody who knows nothing of fingerprints."""

    def damage(folder: Path) -> None:
        said = json.loads((folder / "organ.json").read_text())
        (folder / "organ.json").write_text(json.dumps({**said, **change}))

    return damage


def sealed(change: dict[str, Any] | Callable[[dict[str, Any]], object]) -> Damage:
    """organ.json changed by somebody who mends its hashes."""

    def damage(folder: Path) -> None:
        said = json.loads((folder / "organ.json").read_text())
        said.update(change) if isinstance(change, dict) else change(said)
        said.pop("fingerprint")
        said["weights"] = sha256_file(folder / "organ.safetensors")
        (folder / "organ.json").write_text(json.dumps(Manifest(**said).to_json()))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / "organ.safetensors")
        change(held)
        save_file(held, folder / "organ.safetensors")
        sealed({})(folder)

    return damage


def overwrite(folder: Path, content: bytes) -> None:
    (folder / "organ.safetensors").write_bytes(content)


def flip(folder: Path) -> None:
    content = bytearray((folder / "organ.safetensors").read_bytes())
    content[-5] ^= 1
    overwrite(folder, content)


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a flipped bit": (flip, "organ.safetensors: missing or damaged.*SHA-256.*Copy the organ again"),
    "truncated": (lambda f: overwrite(f, (f / "organ.safetensors").read_bytes()[:-9]), "missing or damaged"),
    "no weights": (lambda f: (f / "organ.safetensors").unlink(), "missing or damaged"),
    "no manifest": (lambda f: (f / "organ.json").unlink(), "organ.json: not the manifest of an organ .*`organ extract` wrote"),
    "manifest is no JSON": (lambda f: (f / "organ.json").write_text("{"), "not the manifest of an organ"),
    "manifest is a list": (lambda f: (f / "organ.json").write_text("[]"), "found list, expected an object"),
    "manifest is deep": (lambda f: (f / "organ.json").write_text("[" * 100_000), "not the manifest of an organ"),
    "another format": (edit({"format": 2}), "format 2, expected 1. Use the version that wrote it"),
    "no format": (edit({"format": None}), "format None, expected 1"),
    "a field more": (edit({"more": 1}), "not the manifest of an organ .*more"),
    "text for a number": (edit({"num_layers": "3"}), "not the manifest of an organ .*num_layers"),
    "another licence": (edit({"licence": "mit"}), "was changed after it was written"),
    "another source": (edit({"source": {"model": "x", "revision": None, "first": 0, "num_layers": 9}}), "was changed after"),
    "half a character": (edit({"family": "\ud800"}), "not the manifest of an organ|was changed"),
    "an unknown family": (sealed({"family": "opt"}), "family 'opt' is not known"),
    "another count": (sealed({"num_layers": 2}), r"are \('llama', 2\), its config says \('llama', 3\)"),
    "another family": (sealed(lambda s: s["config"].update(model_type={"a": 1})), r"its config says \({'a': 1}, 3\)"),
    "a billion layers": (
        sealed(lambda s: (s.update(num_layers=10**9), s["config"].update(num_hidden_layers=10**9))),
        "27 tensors cannot be 1000000000 layers",
    ),
    "another width": (sealed(lambda s: s["config"].update(hidden_size=64)), "not a whole organ: .*the config says"),
    "a config that is none": (sealed(lambda s: s["config"].update(hidden_size="wide")), "its config cannot be read"),
    "a tensor less": (tensors(lambda t: t.pop(UP)), f"not a whole organ: .*{UP} is missing"),
    "a tensor more": (tensors(lambda t: t.update({"lm_head.weight": torch.zeros(2)})), "lm_head.weight belongs to no layer"),
    "a layer more": (tensors(lambda t: t.update({"model.layers.3.x": torch.zeros(2)})), "model.layers.3.x is of a layer that"),
    "whole numbers": (tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), "stored as I8, which is quantised"),
    "a pad token that is none": (sealed(lambda s: s["config"].update(pad_token_id=99)), "cannot build a causal language model"),
    "not safetensors": (lambda f: (overwrite(f, b"\x80\x02}q"), sealed({})(f)), "truncated or not safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_whole_organ_is_refused_with_its_reason(name: str, llama: Pair, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    folder = copy_of(llama, tmp_path)
    damage(folder)
    with pytest.raises(OrganError, match=words) as raised:
        open_organ(folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 800


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OrganError, match=r"nowhere/organ.json: not the manifest of an organ \(.*No such file"):
        open_organ(tmp_path / "nowhere")


@pytest.mark.parametrize("seed", range(60))
def test_a_spoilt_manifest_is_read_or_refused(llama: Pair, tmp_path: Path, seed: int) -> None:
    folder = copy_of(llama, tmp_path)
    hand = Hand(f"organ {seed}")
    said = json.loads((folder / "organ.json").read_text())
    content = hand.bytes(json.dumps(said).encode()) if seed % 2 else hand.json(said, JSON_TEXTS)
    (folder / "organ.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    ends_well(lambda: open_organ(folder))


@pytest.mark.parametrize("seed", range(40))
def test_a_config_that_means_harm_is_read_or_refused(llama: Pair, tmp_path: Path, seed: int) -> None:
    """By somebody who mends the hashes."""
    folder = copy_of(llama, tmp_path)
    hand = Hand(f"config {seed}")

    def spoil(said: dict[str, Any]) -> None:
        said["config"] = {**said["config"], hand.random.choice(list(said["config"])): hand.value()}

    try:
        sealed(spoil)(folder)
    except ValueError:  # JSON has no words for it
        return
    ends_well(lambda: open_organ(folder))
