"""Catalogue and comparison of full-size layouts, from headers over holes instead of weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from header_files import sparse_checkpoint
from safetensors import safe_open
from tiny import DEEP_FAMILIES, save_tiny, tiny_config
from transformers import AutoModelForCausalLM, Gemma2Config, Phi3Config

from transplant_ray.errors import IncompatibleModels
from transplant_ray.models import loading
from transplant_ray.models.catalogue import read_catalogue
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.compare import compare

FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PHI_35 = {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(sparse_checkpoint(tmp_path_factory.mktemp("full") / "phi3", Phi3Config())))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("full") / "gemma2"
    return open_checkpoint(str(sparse_checkpoint(folder, Gemma2Config(), shard_bytes=2_000_000_000)))


@pytest.mark.parametrize(
    ("name", "num_layers", "kinds", "num_parameters"),
    [("phi3", 32, {"attn": 64, "ffn": 64}, 3_821_079_552), ("gemma2", 26, {"attn": 104, "ffn": 78}, 2_614_341_888)],
)
def test_full_size_layouts_have_the_published_modules_and_parameters(
    name: str, num_layers: int, kinds: dict[str, int], num_parameters: int, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(name)
    catalogue = read_catalogue(checkpoint)
    assert Counter(module.role.kind for module in catalogue.modules.values()) == kinds  # 128 and 182 in all
    assert (catalogue.num_layers, catalogue.excluded, catalogue.guessed) == (num_layers, (), False)
    assert checkpoint.num_parameters == num_parameters


def test_a_tied_head_is_no_module_and_not_in_the_file(gemma2: Checkpoint) -> None:
    assert gemma2.config.tie_word_embeddings
    assert not [name for name in (*gemma2.tensors, *read_catalogue(gemma2).modules) if "lm_head" in name]


@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_full_size_files_take_no_disk(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    stats = [(checkpoint.fetch() / file).stat() for file in checkpoint.weight_files()]
    assert sum(stat.st_size for stat in stats) > 2 * checkpoint.num_parameters
    assert sum(stat.st_blocks * 512 for stat in stats) < 1_000_000


def test_the_papers_cross_generation_pair_fits_whole_and_warns_about_positions(phi3: Checkpoint, tmp_path: Path) -> None:
    source = open_checkpoint(str(sparse_checkpoint(tmp_path / "phi35", Phi3Config(**PHI_35))))
    comparison = compare(source, phi3)
    assert (len(comparison.pairs), comparison.excluded) == (128, ())
    warnings = "\n".join(comparison.warnings)
    assert "`rope_parameters.rope_type` is 'longrope' in the source and 'default' in the target" in warnings
    assert "`max_position_embeddings` is 131072 in the source and 4096 in the target" in warnings
    assert max(map(len, comparison.warnings)) < 200  # not 96 factors


def test_a_pair_is_accepted_or_refused_without_reading_a_weight(
    phi3: Checkpoint, gemma2: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "safe_open", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert len(compare(phi3, phi3).pairs) == 128
    with pytest.raises(IncompatibleModels, match=r"no compatible module .* \(phi3\) and target .* \(gemma2\)"):
        compare(phi3, gemma2)


@pytest.mark.parametrize("family", DEEP_FAMILIES)
@pytest.mark.parametrize("shard", [None, 20_000])
def test_a_sparse_checkpoint_has_the_tensors_of_a_real_one(family: str, shard: int | None, tmp_path: Path) -> None:
    real = open_checkpoint(str(save_tiny(tmp_path / "real", family)))
    sparse = open_checkpoint(str(sparse_checkpoint(tmp_path / "sparse", tiny_config(family), "F32", shard)))
    assert {n: (t.shape, t.dtype) for n, t in sparse.tensors.items()} == {n: (t.shape, t.dtype) for n, t in real.tensors.items()}
    assert len(sparse.weight_files()) == 1 if shard is None else len(sparse.weight_files()) > 1
    for file in sparse.weight_files():
        with safe_open(sparse.fetch() / file, framework="pt") as reader:
            assert set(reader.keys()) == {name for name, info in sparse.tensors.items() if info.file == file}
