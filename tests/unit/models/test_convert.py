"""Pickle checkpoints: refused as they come, converted once where a recipe accepts them."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model

from transplant_ray.errors import CheckpointError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.loading import load_model


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny(tmp_path / "model", seed=3)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama", seed=3).state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_with_the_way_to_accept_them(pickled: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*accept: \[pickle\]"):
        open_checkpoint(str(pickled))


def test_an_accepted_pickle_gives_the_same_model_and_is_converted_once(pickled: Path) -> None:
    first = open_checkpoint(str(pickled), accept=["pickle"])
    model = load_model(first, "float32")
    for name, tensor in tiny_model("llama", seed=3).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    made = {path: path.stat().st_mtime_ns for path in first.fetch().iterdir()}
    second = open_checkpoint(str(pickled), accept=["pickle"])
    assert {path: path.stat().st_mtime_ns for path in second.fetch().iterdir()} == made
    assert second.model == str(pickled), "the recipe's own name stays the name"


def test_a_pickle_that_runs_code_is_not_run(pickled: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"model.embed_tokens.weight": Trap()}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_checkpoint(str(pickled), accept=["pickle"])
    assert not (tmp_path / "sprung").exists()
    assert not list((tmp_path / "cache").rglob("*.part"))
