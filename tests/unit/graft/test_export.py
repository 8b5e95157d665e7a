"""An exported folder loads anywhere, differs from the target in the changed bytes alone, and appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_pair, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from transplant_ray.errors import NumericsError, RunError, VariantError
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models import writing
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.header import read_header

DrawVariant = Callable[[Comparison, int, str], Variant]


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor, by name."""
    return {
        name: (folder / info.file).read_bytes()[info.start : info.start + info.num_bytes]
        for file in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(file).items()
    }


def header_bytes(file: Path) -> bytes:
    text = file.read_bytes()
    return text[: 8 + int.from_bytes(text[:8], "little")]


def changed(comparison: Comparison, variant: Variant) -> dict[str, str]:
    """Name in the target's files → name in the source's, for every tensor that the variant changes."""
    pairs = [comparison.pairs[name] for name in variant.coefficients]
    names = {pair.target.disk_weight: pair.source.disk_weight for pair in pairs}
    return names | {pair.target.disk_bias: pair.source.disk_bias for pair in pairs if pair.target.disk_bias}


def test_the_folder_loads_through_plain_transformers(comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> None:
    out = export_checkpoint(comparison, draw_variant(comparison, 0, "hard"), tmp_path / "out", "the card")
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(comparison.target.model).to_dict()
    assert (out / "README.md").read_text() == "the card"


def test_changed_tensors_are_the_sources_bytes_and_all_others_the_targets(
    comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path
) -> None:
    check_bytes(comparison, draw_variant(comparison, 1, "hard"), tmp_path)


def test_bfloat16_tensors_are_the_sources_bytes_too(bfloat16_pair: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> None:
    check_bytes(bfloat16_pair, draw_variant(bfloat16_pair, 1, "hard"), tmp_path)


def check_bytes(pair: Comparison, variant: Variant, tmp_path: Path) -> None:
    out = export_checkpoint(pair, variant, tmp_path / "out", "card")
    source, target = stored_bytes(Path(pair.source.model)), stored_bytes(Path(pair.target.model))
    names = changed(pair, variant)
    assert stored_bytes(out) == {name: source[names[name]] if name in names else target[name] for name in target}
    assert header_bytes(out / "model.safetensors") == header_bytes(Path(pair.target.model) / "model.safetensors")


def test_the_origin_exports_as_the_target(comparison: Comparison, tmp_path: Path) -> None:
    out = export_checkpoint(comparison, ORIGIN, tmp_path / "out", "card")
    for path in Path(comparison.target.model).iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_blends_change_only_their_own_tensors(comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> None:
    variant = draw_variant(comparison, 2, "mixed")
    out = stored_bytes(export_checkpoint(comparison, variant, tmp_path / "out", "card"))
    target = stored_bytes(Path(comparison.target.model))
    differing = {name for name in target if out[name] != target[name]}
    assert differing == changed(comparison, variant).keys()


@pytest.mark.parametrize(("source_shard", "target_shard"), [("50GB", "20KB"), ("20KB", "50GB"), ("30KB", "20KB")])
def test_shards_keep_the_targets_layout(tmp_path: Path, draw_variant: DrawVariant, source_shard: str, target_shard: str) -> None:
    source = save_tiny(tmp_path / "source", seed=1, shard=source_shard)
    target = save_tiny(tmp_path / "target", seed=2, shard=target_shard)
    pair = compare(open_checkpoint(str(source)), open_checkpoint(str(target)))
    variant = draw_variant(pair, 3, "mixed")
    out = export_checkpoint(pair, variant, tmp_path / "out", "card")
    files = {path.name for path in target.glob("model*")}
    assert {path.name for path in out.glob("model*")} == files
    assert len(files) == 1 if target_shard == "50GB" else len(files) > 3
    for name in files:
        same = header_bytes if name.endswith(".safetensors") else Path.read_bytes
        assert same(out / name) == same(target / name)
    with load_resident_pair(pair, "float32").grafted(variant) as resident:
        expected = resident.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items() if name in loaded)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("boom"), OSError(28, "No space left on device")])
def test_a_failure_on_the_way_leaves_nothing(
    llama: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    written = []
    overwrite = writing.overwrite_tensor

    def fail_later(*args: object) -> None:
        written.append(args[1])
        if len(written) == 3:
            raise failure
        overwrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "overwrite_tensor", fail_later)
    expected = RunError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        export_checkpoint(llama, Variant.uniform(llama.pairs), tmp_path / "out", "card")
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(llama: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.shutil, "copyfile", full)
    with pytest.raises(RunError, match=r"out: cannot be written \(No space left on device\). Free space"):
        export_checkpoint(llama, ORIGIN, tmp_path / "out", "card")


def test_what_is_there_is_not_overwritten(llama: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(RunError, match="out: is there already"):
        export_checkpoint(llama, ORIGIN, out, "card")
    assert [path.name for path in out.iterdir()] == ["mine"]
    export_checkpoint(llama, ORIGIN, out, "card", replace=True)
    assert (out / "model.safetensors").exists()
    assert not (out / "mine").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_replacement_keeps_what_was_there(llama: Comparison, tmp_path: Path) -> None:
    out = export_checkpoint(llama, ORIGIN, tmp_path / "out", "old")
    with pytest.raises(VariantError, match="nothing is not a compatible module"):
        export_checkpoint(llama, Variant({"nothing": 1.0}), out, "new", replace=True)
    assert (out / "README.md").read_text() == "old"


def test_variant_json_makes_the_same_checkpoint_again(comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> None:
    out = export_checkpoint(comparison, draw_variant(comparison, 4, "mixed"), tmp_path / "out", "card")
    told = json.loads((out / "variant.json").read_text())
    variant = Variant.from_json(told["coefficients"])
    assert variant.id == told["id"]
    models = [open_checkpoint(told[role]["model"], told[role]["revision"]) for role in ("source", "target")]
    again = export_checkpoint(compare(*models), variant, tmp_path / "again", "card")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_source_with_nan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    pair = tiny_pair(tmp_path)
    name = next(iter(pair.pairs))
    file = Path(pair.source.model) / "model.safetensors"
    tensors = load_file(file)
    tensors[pair.pairs[name].source.disk_weight][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericsError, match=f"{name}.weight holds 1 NaN"):
        export_checkpoint(pair, Variant({name: 1.0}), tmp_path / "out", "card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("bare", ["source", "target"])
def test_a_gpt2_saved_from_its_base_class_has_other_names_on_disk_and_works(
    tmp_path: Path, draw_variant: DrawVariant, bare: str
) -> None:
    for role, seed in (("source", 1), ("target", 2)):
        model = tiny_model("gpt2", seed)
        (model.transformer if role == bare else model).save_pretrained(tmp_path / role)
    pair = compare(open_checkpoint(str(tmp_path / "source")), open_checkpoint(str(tmp_path / "target")))
    variant = draw_variant(pair, 5, "mixed")
    out = export_checkpoint(pair, variant, tmp_path / "out", "card")
    assert ("h.0.attn.c_attn.weight" in stored_bytes(out)) == (bare == "target")
    with load_resident_pair(pair, "float32").grafted(variant) as resident:
        loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in resident.state_dict().items())


def test_a_source_of_another_dtype_takes_the_targets(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", seed=1)
    tiny_model("llama", 2, torch.bfloat16).save_pretrained(tmp_path / "target")
    pair = compare(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "target")))
    variant = Variant.uniform(pair.pairs)
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(pair, variant, tmp_path / "out", "card"))
    assert exported.dtype == torch.bfloat16
    with load_resident_pair(pair, "float32").grafted(variant) as resident:
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor.float(), resident.state_dict()[name])
