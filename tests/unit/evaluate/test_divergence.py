"""KL(target ‖ variant), against a plain forward of one text at a time, whatever is packed with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf, isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import VOCABULARY, draw_examples, draw_variant, left_tokenizer
from tiny import EOS, tiny_pair
from torch.nn.functional import kl_div

from transplant_ray.errors import DataError, VariantError
from transplant_ray.evaluate import engine as module
from transplant_ray.evaluate.divergence import _divergences, diverge
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant


def texts(lengths: Sequence[int] = (9, 2, 5, 9)) -> list[Rendered]:
    rng = random.Random(3)
    drawn = [tuple(rng.randrange(3, VOCABULARY) for _ in range(length)) for length in lengths]
    return [Rendered(f"t{place}", ids[:1], ids[1:], "") for place, ids in enumerate(drawn)]


def engine_of(pair: ResidentPair, rows: int = 8) -> Engine:
    return Engine(pair, left_tokenizer(), GenerationSettings(4, (EOS,), batch_size=rows), "exact")


def plain(pair: ResidentPair, variant: Variant, text: Rendered) -> float:
    ids = torch.tensor([[*text.prompt_ids, *text.answer_ids[:-1]]])
    with torch.inference_mode():
        target = pair.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        with pair.grafted(variant) as model:
            other = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(kl_div(other, target, log_target=True, reduction="none").sum(-1).mean())


def assert_plain(pair: ResidentPair, rows: int) -> None:
    rng = random.Random(5)
    variants = [Variant.uniform(pair.modules), *(draw_variant(pair, rng, what) for what in ("nested", "random")), ORIGIN]
    found = engine_of(pair, rows).divergences(variants, texts())
    for variant in variants:
        for value, text in zip(found[variant.id], texts(), strict=True):
            assert value is not None
            assert isclose(value, plain(pair, variant, text), rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_it_is_that_of_a_plain_forward_however_many_rows_share_a_pass(pair: ResidentPair, rows: int) -> None:
    assert_plain(pair, rows)


def test_modules_that_mix_rows_are_read_one_variant_at_a_time(tmp_path: Path) -> None:
    assert_plain(load_resident_pair(tiny_pair(tmp_path, "opt"), "float32"), rows=8)


def test_the_target_does_not_diverge_and_another_model_does(pair: ResidentPair) -> None:
    swapped = Variant.uniform(pair.modules)
    found = engine_of(pair).divergences([ORIGIN, swapped], texts())
    assert max(value or 0 for value in found[ORIGIN.id]) < 1e-6
    assert min(value or 0 for value in found[swapped.id]) > 1e-4


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_what_is_no_number_is_none(pair: ResidentPair, number: str) -> None:
    name = next(name for name in pair.modules if name.endswith("down_proj"))
    weight = pair.grafts[name].source.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float(number))
        found = engine_of(pair).divergences([ORIGIN, Variant.uniform([name])], texts())
    finally:
        weight.data.copy_(kept)
    assert None not in found[ORIGIN.id]
    assert set(found[Variant.uniform([name]).id]) == {None}


def test_a_divergence_without_end_is_none() -> None:
    """As float16 has it, where a logit overflows to minus infinity."""
    target = torch.zeros(1, 3)
    assert list(_divergences([target, torch.tensor([[0.0, 0.0, -inf]]), target])) == [None, 0.0]


def test_what_does_not_fit_is_refused_before_anything_is_read(pair: ResidentPair) -> None:
    with pytest.raises(VariantError, match="not a compatible module"):
        engine_of(pair).divergences([Variant.uniform(["no.such.module"])], texts())
    with pytest.raises(DataError, match="positions"):
        engine_of(pair).divergences([ORIGIN], texts([5000]))


def test_examples_of_a_task_are_no_texts_but_have_a_divergence_too(pair: ResidentPair) -> None:
    """Over the answer alone, given the whole prompt."""
    (example,) = draw_examples(random.Random(7), 1)
    swapped = Variant.uniform(pair.modules)
    (value,) = engine_of(pair).divergences([swapped], [example])[swapped.id]
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids[:-1]]])
    with torch.inference_mode():
        target = pair.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with pair.grafted(swapped) as model:
            other = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    by_token = kl_div(other, target, log_target=True, reduction="none").sum(-1)
    assert value == pytest.approx(float(by_token[-len(example.answer_ids) :].mean()), rel=1e-4)


def test_a_variant_that_raises_has_no_divergence_and_the_others_have_theirs(
    pair: ResidentPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [Variant.uniform(pair.modules), Variant.uniform(list(pair.modules)[:2])]
    expected = engine_of(pair).divergences(variants, texts())
    alone: list[int] = []

    def fragile(model: Any, asked: Any, pick: Any, rows: int, *, together: bool) -> Any:
        """Two variants together are too many, and so is the second that comes alone."""
        alone.append(len({variant for variant, _ in asked}))
        if alone[-1] > 1 or alone.count(1) > 1:
            raise RuntimeError("a kernel that this device lacks")
        return diverge(model, asked, pick, rows, together=together)

    monkeypatch.setattr(module, "diverge", fragile)
    found = engine_of(pair).divergences(variants, texts())
    assert alone == [2, 1, 1]
    (failed,) = [variant for variant, values in found.items() if values == (None,) * len(texts())]
    (well,) = found.keys() - {failed}
    assert found[well] == pytest.approx(expected[well], rel=1e-4)
