"""A delta turns the target into the exported checkpoint and back, byte for byte, and refuses whatever is not its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from transplant_ray.errors import CheckpointError, RunError
from transplant_ray.files import sha256_file
from transplant_ray.graft.export import apply_delta, export_checkpoint, export_delta
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

DrawVariant = Callable[[Comparison, int, str], Variant]


@dataclass(frozen=True)
class Exported:
    target: Path
    checkpoint: Path
    delta: Path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def export_both(pair: Comparison, variant: Variant, folder: Path) -> Exported:
    checkpoint = export_checkpoint(pair, variant, folder / "checkpoint", "card")
    return Exported(Path(pair.target.model), checkpoint, export_delta(pair, variant, checkpoint, folder / "delta"))


@pytest.fixture
def exported(comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> Exported:
    return export_both(comparison, draw_variant(comparison, 1, "mixed"), tmp_path)


@pytest.fixture
def of_llama(llama: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> Exported:
    return export_both(llama, draw_variant(llama, 1, "hard"), tmp_path)


def test_applied_it_is_the_checkpoint_and_undone_the_target(exported: Exported, tmp_path: Path) -> None:
    there = apply_delta(exported.delta, str(exported.target), tmp_path / "there")
    assert contents(there) == contents(exported.checkpoint)
    back = apply_delta(exported.delta, str(there), tmp_path / "back", undo=True)
    assert contents(back) == contents(exported.target)


def test_it_holds_just_the_changed_tensors(exported: Exported, comparison: Comparison, draw_variant: DrawVariant) -> None:
    pairs = [comparison.pairs[name] for name in draw_variant(comparison, 1, "mixed").coefficients]
    names = {name for pair in pairs for name in (pair.target.disk_weight, pair.target.disk_bias) if name}
    after, before = (load_file(folder / "model.safetensors") for folder in (exported.checkpoint, exported.target))
    for file, model in (("delta.safetensors", after), ("undo.safetensors", before)):
        with safe_open(exported.delta / file, framework="pt") as delta:
            assert set(delta.keys()) == names
            assert all(torch.equal(delta.get_tensor(name), model[name]) for name in names)


@pytest.mark.parametrize("shape", ["sharded", "bare", "bfloat16", "origin"])
def test_other_layouts_come_back_too(tmp_path: Path, draw_variant: DrawVariant, shape: str) -> None:
    family = "gpt2" if shape == "bare" else "llama"
    for role, seed in (("source", 1), ("target", 2)):
        model = tiny_model(family, seed, torch.bfloat16 if shape == "bfloat16" else torch.float32)
        model = model.transformer if shape == "bare" else model
        model.save_pretrained(tmp_path / role, max_shard_size="20KB" if shape == "sharded" else "1GB")
    pair = compare(open_checkpoint(str(tmp_path / "source")), open_checkpoint(str(tmp_path / "target")))
    variant = ORIGIN if shape == "origin" else draw_variant(pair, 2, "mixed")
    exported = export_both(pair, variant, tmp_path)
    there = apply_delta(exported.delta, str(exported.target), tmp_path / "there")
    assert contents(there) == contents(exported.checkpoint)
    back = apply_delta(exported.delta, str(there), tmp_path / "back", undo=True)
    assert contents(back) == contents(exported.target)


def check_refused(tmp_path: Path, exported: Exported, target: Path, words: str, *, undo: bool = False) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=words):
        apply_delta(exported.delta, str(target), tmp_path / "refused", undo=undo)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_another_target_is_refused(of_llama: Exported, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    check_refused(tmp_path, of_llama, other, r"other: model.safetensors differs from the target that this delta was made for")
    sharded = save_tiny(tmp_path / "sharded", seed=2, shard="20KB")
    check_refused(tmp_path, of_llama, sharded, "differs from the target that this delta was made for")


def test_it_is_not_applied_twice_nor_undone_on_the_target(of_llama: Exported, tmp_path: Path) -> None:
    check_refused(tmp_path, of_llama, of_llama.checkpoint, "differs from the target")
    check_refused(tmp_path, of_llama, of_llama.target, "differs from the checkpoint that this delta makes", undo=True)


@pytest.mark.parametrize(("file", "undo"), [("delta.safetensors", False), ("undo.safetensors", True)])
def test_a_damaged_delta_is_refused(of_llama: Exported, tmp_path: Path, file: str, undo: bool) -> None:
    path, target = of_llama.delta / file, of_llama.checkpoint if undo else of_llama.target
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-100], b""):
        path.write_bytes(damaged)
        check_refused(tmp_path, of_llama, target, rf"{file}: missing or damaged .* Copy the delta again", undo=undo)
    path.unlink()
    check_refused(tmp_path, of_llama, target, f"{file}: missing or damaged", undo=undo)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        '{"format": 1}',
        '{"target": {}, "result": [], "delta": {}}',
        "[" * 10**5,
        "\0",
        '{"format": 1, "target": {"files": {}}, "result": {"files": []}, "delta": {}}',
    ],
)
def test_a_broken_manifest_is_refused(of_llama: Exported, tmp_path: Path, text: str) -> None:
    (of_llama.delta / "delta.json").write_text(text)
    check_refused(tmp_path, of_llama, of_llama.target, "delta.json: not the manifest of a delta")


def test_a_manifest_of_another_format_is_refused(of_llama: Exported, tmp_path: Path) -> None:
    rewrite(of_llama.delta, {"format": 2})
    check_refused(tmp_path, of_llama, of_llama.target, "format 2, expected 1. Use the version that wrote it")


def test_a_folder_that_is_no_delta_is_refused(of_llama: Exported, tmp_path: Path) -> None:
    for folder in (of_llama.target, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"not the manifest of a delta .* Expected a folder that `export` wrote"):
            apply_delta(folder, str(of_llama.target), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("file", ["README.md", "variant.json"])
def test_an_incomplete_delta_is_refused(of_llama: Exported, tmp_path: Path, file: str) -> None:
    (of_llama.delta / file).unlink()
    check_refused(tmp_path, of_llama, of_llama.target, f"delta: {file} is missing. Copy the delta again")


def rewrite(delta: Path, changes: dict[str, object]) -> None:
    manifest = json.loads((delta / "delta.json").read_text())
    (delta / "delta.json").write_text(json.dumps(manifest | changes))


def forge(delta: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with a hash that fits."""
    save_file(tensors, delta / "delta.safetensors")
    rewrite(delta, {"delta": {"delta.safetensors": sha256_file(delta / "delta.safetensors")}})


def test_a_forged_delta_cannot_write_outside_the_targets_tensors(of_llama: Exported, tmp_path: Path) -> None:
    name, tensor = next(iter(load_file(of_llama.delta / "delta.safetensors").items()))
    forge(of_llama.delta, {"stranger": tensor})
    check_refused(tmp_path, of_llama, of_llama.target, "stranger is not in the target")
    forge(of_llama.delta, {name: tensor[1:].clone()})
    check_refused(tmp_path, of_llama, of_llama.target, f"{name}: .*cannot replace")
    forge(of_llama.delta, {name: tensor + 1})
    check_refused(tmp_path, of_llama, of_llama.target, "the result is not what the delta promises")


def test_what_is_there_is_not_overwritten(of_llama: Exported, tmp_path: Path) -> None:
    before = contents(of_llama.checkpoint)
    with pytest.raises(RunError, match="checkpoint: is there already"):
        apply_delta(of_llama.delta, str(of_llama.target), of_llama.checkpoint)
    assert contents(of_llama.checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "delta"]


def test_a_delta_can_be_moved(of_llama: Exported, tmp_path: Path) -> None:
    moved = {name: shutil.move(getattr(of_llama, name), tmp_path / f"{name}2") for name in ("checkpoint", "delta")}
    target = shutil.copytree(of_llama.target, tmp_path / "elsewhere")
    there = apply_delta(moved["delta"], str(target), tmp_path / "there")
    assert contents(there) == contents(moved["checkpoint"])
