"""What an organ holds, which layers can be cut out, and what cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from header_files import sparse_checkpoint
from hub import COMMIT, local_hub
from safetensors.torch import load_file, save_file
from stacks import Pair, contents, load, save_model
from tiny import save_tiny, tiny_config
from transformers import AutoConfig, BertConfig, Phi3Config

from transplant_ray.errors import CheckpointError, NumericsError, OrganError, RunError
from transplant_ray.models import loading
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.extract import extract_organ, select_layers
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.manifest import Source

UP = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("text", "num_layers", "layers"),
    [
        ("4-6", 12, [4, 5, 6]), ("4", 12, [4]), ("0-11", 12, list(range(12))), ("4-4", 5, [4]),
        ("default", 12, [4, 5, 6]), ("default", 22, [7, 8, 9]), ("default", 24, [8, 9, 10]),  # arXiv:2601.13580, its three models
        ("default", 3, [1, 2]), ("default", 1, [0]),
    ],
)  # fmt: skip
def test_layers_are_counted_from_0_and_both_ends_are_taken(text: str, num_layers: int, layers: list[int]) -> None:
    assert list(select_layers(text, num_layers)) == layers


@pytest.mark.parametrize("text", ["1,3", "1-3-5", "1,2,3", "", "-1", "1-", "a", "4:6", "１-２", "1.5", "9999999"])
def test_what_is_no_stretch_is_refused(text: str) -> None:
    with pytest.raises(OrganError, match=r"not a contiguous stretch\. Give the first and the last, such as 4-6"):
        select_layers(text, 12)


@pytest.mark.parametrize("text", ["12", "10-12", "6-4", "11-99"])
def test_layers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(OrganError, match=rf"layers '{text}': expected a stretch of 0-11, for layers are counted from 0"):
        select_layers(text, 12)


def test_an_organ_holds_its_layers_counted_from_0_and_nothing_else(pair: Pair) -> None:
    source = load(pair.source.folder).get_submodule(pair.layers)
    expected = {
        f"{pair.layers}.{place}.{path}": tensor for place in range(3) for path, tensor in source[place + 1].state_dict().items()
    }
    found = load_file(Path(pair.organ.checkpoint.model) / "organ.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_its_manifest_says_what_it_is(pair: Pair) -> None:
    manifest = pair.organ.manifest
    assert (manifest.family, manifest.num_layers, manifest.layers) == (pair.family, 3, "1-3")
    assert manifest.source == Source(model=pair.source.model, revision=None, first=1, num_layers=6)
    assert manifest.training is None
    config = AutoConfig.for_model(**manifest.config)
    assert config.num_hidden_layers == 3
    for key in ("hidden_size", "num_attention_heads", "rope_parameters", "rms_norm_eps", "sliding_window"):
        assert getattr(config, key, None) == getattr(pair.source.config, key, None)
    types = getattr(pair.source.config, "layer_types", None)
    assert getattr(config, "layer_types", None) == (types and types[1:4])
    assert open_organ(Path(pair.organ.checkpoint.model)) == pair.organ


def test_it_reads_only_the_tensors_that_it_takes(llama: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = loading.safe_open

    class Watched:
        def __init__(self, *args: object, **settings: object) -> None:
            self.opened = real(*args, **settings)

        def __enter__(self) -> Watched:
            self.shard = self.opened.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self.shard.get_tensor(name)
            return tensor

    monkeypatch.setattr(loading, "safe_open", Watched)
    extract_organ(llama.source, "4", tmp_path / "organ")
    assert sorted(read) == sorted(name for name in llama.source.tensors if name.startswith("model.layers.4."))


def test_a_full_size_layer_is_cut_out_of_a_hub_model_by_its_own_shards(tmp_path: Path) -> None:
    """Of 8 shards the two that hold layer 3."""
    config = Phi3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    folder = sparse_checkpoint(tmp_path / "phi3", config, shard_bytes=200_000)
    shards = {info.file for name, info in open_checkpoint(str(folder)).tensors.items() if name.startswith("model.layers.3.")}
    with local_hub({"org/phi3": folder}, tmp_path / "cache") as hub:
        checkpoint = open_checkpoint("org/phi3")
        headers = dict(hub.sent)
        organ = open_organ(extract_organ(checkpoint, "3", tmp_path / "organ"))
    assert len(checkpoint.weight_files()) > 5
    whole = {file for file in checkpoint.weight_files() if hub.sent[file] > headers[file]}
    assert whole == shards
    assert organ.manifest.source == Source(model="org/phi3", revision=COMMIT, first=3, num_layers=16)


def test_buffers_of_older_versions_stay_behind(tmp_path: Path) -> None:
    """GPT-2 on the hub has a mask in every layer, which no loader reads."""
    folder = save_model(tmp_path / "gpt2", "gpt2")
    path = folder / "model.safetensors"
    save_file({**load_file(path), "transformer.h.1.attn.bias": torch.ones(1, 1, 128, 128)}, path, {"format": "pt"})
    organ = open_organ(extract_organ(open_checkpoint(str(folder)), "1", tmp_path / "organ"))
    assert "transformer.h.0.attn.bias" not in organ.checkpoint.tensors


@pytest.mark.parametrize(
    ("card", "said", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", None, "apache-2.0"),
        ("---\nlicense: apache-2.0\n---\n# Model", "mit", "mit"),
        ("# Model", None, None),
        ("---\nlicense: [a, b]\n---", None, None),
        ("---\n{: }\n---", None, None),
        (None, None, None),
    ],
)
def test_the_licence_goes_along(llama: Pair, tmp_path: Path, card: str | None, said: str | None, licence: str | None) -> None:
    folder = Path(shutil.copytree(str(llama.source.folder), tmp_path / "source"))
    (folder / "LICENSE").write_text("the licence")
    if card is not None:
        (folder / "README.md").write_text(card)
    out = extract_organ(open_checkpoint(str(folder)), "4", tmp_path / "organ", said)
    assert open_organ(out).manifest.licence == licence
    assert (out / "LICENSE").read_text() == "the licence"
    assert f"Licence of the model that it was cut out of: {licence or 'not said'}." in (out / "README.md").read_text()


def test_a_model_without_a_tokenizer_has_an_unknown_vocabulary(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    vocabulary = open_organ(extract_organ(open_checkpoint(str(folder)), "4", tmp_path / "organ")).manifest.vocabulary
    assert (vocabulary.size, vocabulary.tokenizer) == (tiny_config("llama").vocab_size, None)


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="bert is not a decoder"):
        open_checkpoint(str(tmp_path))


def test_a_family_that_nobody_has_looked_at_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "opt", "opt")))
    with pytest.raises(CheckpointError, match=r"layers of family opt cannot be moved.*Expected one of gemma, gemma2, .*qwen3"):
        extract_organ(checkpoint, "0", tmp_path / "organ")
    assert not (tmp_path / "organ").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(UP), f"{UP} is missing"),
        (lambda t: t.update({"model.layers.6.x": torch.zeros(1)}), "model.layers.6.x is of a layer that the config does not have"),
        (lambda t: t.update({UP: torch.zeros(48, 16)}), r"is \(48, 16\), the config says \(48, 32\)"),
        (lambda t: t.update({UP: torch.zeros(48, 32, dtype=torch.int8)}), "stored as I8.*quantised"),
    ],
)  # fmt: skip
def test_layers_that_are_not_whole_are_refused(llama: Pair, tmp_path: Path, damage: object, words: str) -> None:
    folder = Path(shutil.copytree(str(llama.source.folder), tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        extract_organ(open_checkpoint(str(folder)), "2", tmp_path / "organ")


def test_numbers_that_are_none_are_refused_and_nothing_is_written(llama: Pair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(str(llama.source.folder), tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=f"{UP} holds 1 NaN"):
        extract_organ(open_checkpoint(str(folder)), "1-3", tmp_path / "organ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    extract_organ(open_checkpoint(str(folder)), "3-5", tmp_path / "organ")  # its own layers are whole


def test_what_is_there_is_not_overwritten(llama: Pair) -> None:
    folder = Path(llama.organ.checkpoint.model)
    before = contents(folder)
    with pytest.raises(RunError, match="organ: is there already"):
        extract_organ(llama.source, "4", folder)
    assert contents(folder) == before


def test_the_same_layers_make_the_same_organ(llama: Pair, tmp_path: Path) -> None:
    extract_organ(llama.source, "1-3", tmp_path / "organ")
    assert contents(tmp_path / "organ") == contents(Path(llama.organ.checkpoint.model))
    assert json.loads((tmp_path / "organ" / "organ.json").read_text())["fingerprint"] == llama.organ.manifest.fingerprint
