"""Hub checkpoints, read from a hub on this machine: headers by range requests, files only when they are fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from header_files import sparse_checkpoint
from hub import COMMIT, local_hub
from huggingface_hub import constants
from tiny import save_tiny
from transformers import Phi3Config

from transplant_ray.errors import CheckpointError
from transplant_ray.models.checkpoint import INDEX, SINGLE, open_checkpoint, read_generation_ends
from transplant_ray.models.compare import compare
from transplant_ray.models.loading import load_tokenizer
from transplant_ray.models.writing import write_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sharded"), "llama", shard="20KB")


def test_a_full_size_pair_on_the_hub_is_compared_without_fetching_it(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "phi3", Phi3Config())
    with local_hub({"org/phi3": folder}, tmp_path / "cache") as hub:
        checkpoint = open_checkpoint("org/phi3")
        assert len(compare(checkpoint, checkpoint).pairs) == 128
        assert hub.sent[SINGLE] < 200_000  # of 7.6 GB


def test_the_hub_and_a_folder_hold_the_same_tensors(sharded: Path, tmp_path: Path) -> None:
    local = open_checkpoint(str(sharded))
    with local_hub({"org/tiny": sharded}, tmp_path / "cache"):
        remote = open_checkpoint("org/tiny", "main")
        assert (remote.model, remote.revision, remote.folder) == ("org/tiny", COMMIT, None)
        assert [(n, t.file, t.dtype, t.shape, t.num_bytes) for n, t in remote.tensors.items()] == [
            (n, t.file, t.dtype, t.shape, t.num_bytes) for n, t in local.tensors.items()
        ]
        fetched = remote.fetch()
    assert all((fetched / path.name).read_bytes() == path.read_bytes() for path in sharded.iterdir())


def test_a_changed_copy_of_a_hub_checkpoint_is_that_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    replaced = {UP: lambda: torch.ones(48, 32)}
    for name in ("local", "remote"):
        (tmp_path / name).mkdir()
    write_checkpoint(open_checkpoint(str(sharded)), replaced, tmp_path / "local")
    with local_hub({"org/tiny": sharded}, tmp_path / "cache"):
        write_checkpoint(open_checkpoint("org/tiny"), replaced, tmp_path / "remote")
    files = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "remote").iterdir())
    assert all((tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes() for name in files)


def test_tokenizer_and_end_tokens_come_without_the_weights(sharded: Path, tmp_path: Path) -> None:
    with local_hub({"org/tiny": sharded}, tmp_path / "cache") as hub:
        checkpoint = open_checkpoint("org/tiny")
        headers = dict(hub.sent)
        assert load_tokenizer(checkpoint)("ab")["input_ids"] == load_tokenizer(open_checkpoint(str(sharded)))("ab")["input_ids"]
        assert read_generation_ends(checkpoint) == 2
        assert {f: n for f, n in hub.sent.items() if f.endswith(".safetensors")} == {
            f: n for f, n in headers.items() if f.endswith(".safetensors")
        }


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _only_pickle(folder: Path) -> None:
    first_shard(folder).rename(folder / "pytorch_model.bin")
    (folder / INDEX).unlink()


def _point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][UP] = "../other/x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json cannot be read"),
    "only pickle": (_only_pickle, r"no safetensors on the hub.*accept: \[pickle\]"),
    "missing shard": (lambda f: first_shard(f).unlink(), r"the hub did not give it"),
    "corrupt header": (lambda f: first_shard(f).write_bytes(b"\x08" + bytes(15)), r"header on the hub is corrupt"),
    "empty shard": (lambda f: first_shard(f).write_bytes(b"\0"), r"corrupt|did not give it"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), r"shard index .* on the hub is corrupt"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), r"shard index .* on the hub is corrupt"),
    "index is a list of maps": (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), r"shard index .* is corrupt"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), r"no `weight_map`"),
    "shard outside": (_point_outside, r"the hub did not give it|a shard is a .safetensors file in the same folder"),
    "tensor not in its shard": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"ghost": first_shard(f).name}})),
        r"ghost is not in model-00001",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_hub_checkpoint_that_cannot_be_read_is_refused_with_its_reason(name: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    damage(folder)
    with local_hub({"org/tiny": folder}, tmp_path / "cache"), pytest.raises(CheckpointError, match=words) as raised:
        open_checkpoint("org/tiny")
    assert str(raised.value).startswith("org/tiny: ")


@pytest.mark.parametrize(
    ("model", "revision"), [("org/nonesuch", None), ("org/tiny", "nonesuch"), ("not a name!", None), ("a--b..c", None)]
)
def test_what_the_hub_does_not_have_is_refused_with_next_steps(
    model: str, revision: str | None, sharded: Path, tmp_path: Path
) -> None:
    with local_hub({"org/tiny": sharded}, tmp_path / "cache"), pytest.raises(CheckpointError) as raised:
        open_checkpoint(model, revision)
    assert str(raised.value).startswith(f"{model}: not a local folder, and the hub did not give it")
    assert "Check the path or id, the revision, the network, and `hf auth login`" in str(raised.value)


def test_a_hub_that_does_not_answer_is_an_error_that_says_so(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)  # its retries wait for 23 s
    with local_hub({"org/tiny": sharded}, tmp_path / "cache"):
        checkpoint = open_checkpoint("org/tiny")
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(CheckpointError, match=r"org/tiny: not a local folder.*network"):
            open_checkpoint("org/tiny")
        with pytest.raises(CheckpointError, match=r"org/tiny: the hub did not give model-00001.*Try again, or download"):
            checkpoint.fetch()


def test_an_offline_machine_says_that_it_is_offline() -> None:
    with pytest.raises(CheckpointError, match="offline mode is enabled"):
        open_checkpoint("org/tiny")
