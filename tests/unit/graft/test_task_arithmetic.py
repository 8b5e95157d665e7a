"""Task arithmetic is its formula, tensor by tensor, and leaves alone what the three models do not share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, save_tiny, tiny_pair
from transformers import AutoModelForCausalLM

from transplant_ray.graft.task_arithmetic import counterparts, num_merged_parameters, write_task_arithmetic
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare


def with_base(pair: Comparison, folder: Path) -> Comparison:
    return compare(open_checkpoint(str(folder)), pair.target)


def merged(pair: Comparison, base: Comparison, scale: float, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    write_task_arithmetic(pair, base, scale, out)
    return stored(out)


def stored(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_every_tensor_is_the_formula(comparison: Comparison, tmp_path: Path, scale: float) -> None:
    """In float64, and the folder loads with nothing missing."""
    base = with_base(comparison, save_tiny(tmp_path / "base", comparison.target.config.model_type, seed=3))
    found = merged(comparison, base, scale, tmp_path / "out")
    b, t, s = (stored(side.model) for side in (base.source, comparison.target, comparison.source))
    assert found.keys() == t.keys() == counterparts(base).keys()
    for name, tensor in found.items():
        expected = b[name].double() + scale * ((t[name].double() - b[name].double()) + (s[name].double() - b[name].double()))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert num_merged_parameters(comparison, base) == sum(tensor.numel() for tensor in t.values())


def test_around_the_target_it_is_the_way_to_the_source(llama: Comparison, tmp_path: Path) -> None:
    base = with_base(llama, Path(llama.target.model))
    whole, half = (merged(llama, base, scale, tmp_path / str(scale)) for scale in (1.0, 0.5))
    source, target = stored(llama.source.model), stored(llama.target.model)
    for name in source:
        torch.testing.assert_close(whole[name], source[name])
        torch.testing.assert_close(half[name], torch.lerp(target[name], source[name], 0.5))


def test_the_targets_dtype_is_kept_and_the_sum_is_taken_in_float32(tmp_path: Path) -> None:
    pair = tiny_pair(tmp_path, dtype=torch.bfloat16)
    base = with_base(pair, save_tiny(tmp_path / "base", seed=3))
    found = merged(pair, base, 0.7, tmp_path / "out")
    b, t, s = (stored(side.model) for side in (base.source, pair.target, pair.source))
    for name, tensor in found.items():
        start = b[name].float()
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (start + 0.7 * ((t[name].float() - start) + (s[name].float() - start))).bfloat16()), name


def test_what_is_not_shared_stays_the_targets(tmp_path: Path) -> None:
    """A base with another vocabulary: its embeddings have another shape."""
    pair = tiny_pair(tmp_path)
    base = with_base(pair, save_tiny(tmp_path / "base", seed=3, vocab_size=VOCABULARY + 5))
    found, target = merged(pair, base, 0.5, tmp_path / "out"), stored(pair.target.model)
    alone = target.keys() - counterparts(base).keys()
    assert alone == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name in target if torch.equal(found[name], target[name])} >= alone
    assert any(not torch.equal(found[name], target[name]) for name in target.keys() - alone)
    assert num_merged_parameters(pair, base) == sum(target[name].numel() for name in target.keys() - alone)


def test_a_prefix_of_all_names_is_seen_through(tmp_path: Path) -> None:
    """GPT-2 on the hub has none of `transformer.`."""
    pair = tiny_pair(tmp_path, "gpt2")
    folder = save_tiny(tmp_path / "base", "gpt2", seed=3)
    plain = merged(pair, with_base(pair, folder), 0.5, tmp_path / "plain")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored(folder).items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    again = merged(pair, with_base(pair, folder), 0.5, tmp_path / "again")
    assert all(name.startswith("transformer.") for name in plain)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
