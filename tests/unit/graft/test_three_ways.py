"""The promise: a variant routed by hand in the forward pass, resident by pointer, and exported to a file is one model.

Routed by hand is written here on its own: hooks on the plain target compute y = lerp(x·Wtᵀ + bt, x·Wsᵀ + bs, c) per module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison

DrawVariant = Callable[[Comparison, int, str], Variant]
PROMPTS = ("1", "ab", "4+5", "12+3", "a: b?", "0.5 +1 =\n", "what is 4+15=", "the first of them")  # all of different lengths
NEW_TOKENS = 8


def plain_model(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain_pair(comparison: Comparison) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Source and target through plain `transformers`, loaded once."""
    return _loaded(comparison.source.model), _loaded(comparison.target.model)


_loaded = lru_cache(maxsize=8)(plain_model)


@contextmanager
def routed_by_hand(comparison: Comparison, variant: Variant) -> Iterator[PreTrainedModel]:
    """The plain target with hooks that route every module of the variant; `plain_pair` has no hooks afterwards."""
    source, target = plain_pair(comparison)

    def route(linear: nn.Module, coefficient: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda _module, inputs, output: torch.lerp(output, linear(inputs[0]), coefficient)

    with ExitStack() as hooks:
        for name, coefficient in variant.coefficients.items():
            hook = route(source.get_submodule(name), torch.tensor(coefficient))
            hooks.enter_context(target.get_submodule(name).register_forward_hook(hook))
        yield target


@torch.inference_mode()
def greedy_tokens(model: PreTrainedModel) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    batch = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    return out[:, ids.shape[1] :].tolist()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of every prompt by itself, so that nothing is padding."""
    rows = [tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    return torch.cat([model(input_ids=row).logits[0] for row in rows])


@pytest.mark.parametrize("seed", range(2))
def test_hard_variants_give_equal_tokens_in_all_three_ways(
    comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path, seed: int
) -> None:
    variant = draw_variant(comparison, seed, "hard")
    with routed_by_hand(comparison, variant) as routed:
        expected = greedy_tokens(routed)
    exported = plain_model(export_checkpoint(comparison, variant, tmp_path / "out", "card"))
    with load_resident_pair(comparison, "float32").grafted(variant) as resident:
        assert greedy_tokens(resident) == expected
        assert torch.equal(logits(exported), logits(resident))
    assert greedy_tokens(exported) == expected
    assert expected != greedy_tokens(plain_pair(comparison)[1])


@pytest.mark.parametrize("what", ["alpha", "channels"])
def test_blends_give_equal_logits_in_all_three_ways(
    comparison: Comparison, draw_variant: DrawVariant, tmp_path: Path, what: str
) -> None:
    variant = draw_variant(comparison, 11, what)
    with routed_by_hand(comparison, variant) as routed:
        expected = logits(routed)
    exported = plain_model(export_checkpoint(comparison, variant, tmp_path / "out", "card"))
    with load_resident_pair(comparison, "float32").grafted(variant) as resident:
        assert torch.equal(logits(exported), logits(resident))
        torch.testing.assert_close(logits(resident), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(plain_pair(comparison)[1]), atol=1e-2)


def test_resident_and_exported_agree_in_bfloat16(bfloat16_pair: Comparison, draw_variant: DrawVariant, tmp_path: Path) -> None:
    variant = draw_variant(bfloat16_pair, 12, "mixed")
    exported = plain_model(export_checkpoint(bfloat16_pair, variant, tmp_path / "out", "card"))
    assert exported.dtype == torch.bfloat16
    with load_resident_pair(bfloat16_pair, "bfloat16").grafted(variant) as resident:
        assert torch.equal(logits(exported), logits(resident))


def test_all_swapped_has_every_module_of_the_source_and_nothing_else(comparison: Comparison) -> None:
    source, target = (model.state_dict() for model in plain_pair(comparison))
    mine = {f"{name}.{part}" for name in comparison.pairs for part in ("weight", "bias")}
    with load_resident_pair(comparison, "float32").grafted(Variant.uniform(comparison.pairs)) as resident:
        for name, tensor in resident.state_dict().items():
            assert torch.equal(tensor, (source if name in mine else target)[name])
