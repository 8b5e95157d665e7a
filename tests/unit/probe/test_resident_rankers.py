"""Rankers that need both models, against slow readings of their definitions: one example at a time, through plain `transformers`.

Shapes: S positions, A answer tokens, O output channels of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEAR_FAMILIES, EOS, VOCABULARY, tiny_pair, tiny_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from transplant_ray.errors import NumericsError
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant, blend
from transplant_ray.models.compare import Comparison
from transplant_ray.models.loading import load_model
from transplant_ray.probe import resident_rankers
from transplant_ray.probe.measured import Measured, Sample
from transplant_ray.probe.resident_rankers import RESIDENT, Bench, measure

STEPS = 3


def draw_examples(count: int = 5) -> list[Rendered]:
    rng = np.random.default_rng(3)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, rng.integers(1, most)).tolist())

    return [Rendered(f"e{i}", (1, *tokens(9)), (*tokens(5), EOS), "") for i in range(count)]


@pytest.fixture(scope="module", params=DEAR_FAMILIES)
def comparison(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bench(comparison: Comparison) -> Bench:
    return make_bench(comparison)


def make_bench(comparison: Comparison, rows: int = 64, dtype: str = "float64") -> Bench:
    settings = GenerationSettings(4, (EOS,), batch_size=rows)
    engine = Engine(load_resident_pair(comparison, dtype), tiny_tokenizer(), settings, "exact")
    return Bench(engine, lambda: load_model(comparison.source, dtype), draw_examples(), STEPS)


def loss_of(model: nn.Module, example: Rendered) -> torch.Tensor:
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    logits_SV = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    return cross_entropy(logits_SV[len(example.prompt_ids) - 1 :], torch.tensor(example.answer_ids))


def mean_loss(bench: Bench, variant: Variant) -> float:
    with bench.engine.pair.grafted(variant) as model, torch.inference_mode():
        return float(torch.stack([loss_of(model, example) for example in bench.examples]).mean())


def slow_attribution(bench: Bench) -> dict[str, torch.Tensor]:
    """Module → (O,), from gradients of the weights themselves: ⟨dL/dW, Ws − Wt⟩ + ⟨dL/db, bs − bt⟩, channel by channel."""
    pair, total = bench.engine.pair, {}
    for step in range(STEPS):
        leaves = {}
        for name, graft in pair.grafts.items():
            for part in ("weight", "bias"):
                ours, theirs = getattr(graft.target, part), getattr(graft.source, part)
                if ours is not None:
                    leaves[name, part] = nn.Parameter(blend(ours, theirs, (step + 0.5) / STEPS).clone())
                    setattr(graft.linear, part, leaves[name, part])
        torch.stack([loss_of(pair.model, example) for example in bench.examples]).mean().backward()
        for (name, part), leaf in leaves.items():
            graft = pair.grafts[name]
            moved = leaf.grad * (getattr(graft.source, part) - getattr(graft.target, part))  # type: ignore[operator]
            by_channel = moved if part == "bias" else moved.sum(0 if graft.module.transposed else 1)
            total[name] = total.get(name, 0) - by_channel / STEPS
        pair.undo()
    return total


def test_attribution_is_the_gradient_of_the_weights_along_the_path(bench: Bench) -> None:
    measured = measure("attribution", bench)
    expected = slow_attribution(bench)
    assert measured.channels is not None
    for name, by_channel in expected.items():
        np.testing.assert_allclose(measured.channels[name], by_channel.numpy(), rtol=1e-4, atol=1e-7)
        assert measured.scores[name] == pytest.approx(float(by_channel.sum()), rel=1e-4, abs=1e-7)
    assert (measured.cost.forwards, measured.cost.backwards) == (2 * STEPS + 2, STEPS)


def test_attribution_leaves_the_model_as_it_was(bench: Bench) -> None:
    before = mean_loss(bench, ORIGIN)
    measure("attribution", bench)
    assert mean_loss(bench, ORIGIN) == before
    assert not any("forward" in graft.linear.__dict__ for graft in bench.engine.pair.grafts.values())
    assert not any(parameter.requires_grad for parameter in bench.engine.pair.model.parameters())


def test_attribution_sums_to_what_the_full_swap_changes(comparison: Comparison) -> None:
    bench = make_bench(comparison)
    fine = Bench(bench.engine, bench.source, bench.examples, 40)
    measured = measure("attribution", fine)
    change = mean_loss(bench, ORIGIN) - mean_loss(bench, Variant.uniform(bench.names))
    assert sum(measured.scores.values()) == pytest.approx(change, rel=resident_rankers.PATH_ERROR)
    assert not measured.notes


def test_attribution_says_how_far_its_sum_is_off(bench: Bench) -> None:
    coarse = measure("attribution", Bench(bench.engine, bench.source, bench.examples, 1))
    change = mean_loss(bench, ORIGIN) - mean_loss(bench, Variant.uniform(bench.names))
    off = abs(sum(coarse.scores.values()) - change) / abs(change) > resident_rankers.PATH_ERROR
    assert len(coarse.notes) == off
    assert all("rank.steps: 2" in note for note in coarse.notes)


@pytest.mark.parametrize("ranker", RESIDENT)
def test_batches_change_nothing(comparison: Comparison, bench: Bench, ranker: str) -> None:
    one_by_one, together = measure(ranker, make_bench(comparison, rows=1)), measure(ranker, bench)
    assert list(one_by_one.scores) == list(together.scores)
    np.testing.assert_allclose(list(one_by_one.scores.values()), list(together.scores.values()), rtol=1e-6, atol=1e-9)


def test_channel_is_the_mean_difference_of_outputs_on_the_same_tokens(bench: Bench) -> None:
    measured = measure("channel", bench)
    models = (bench.source(), bench.engine.pair.model)
    for name in bench.names:
        difference_AO = torch.cat([abs(np.subtract(*(outputs(model, name, e) for model in models))) for e in bench.examples])
        assert measured.channels is not None
        np.testing.assert_allclose(measured.channels[name], difference_AO.mean(0).numpy(), rtol=1e-5, atol=1e-7)
        assert measured.scores[name] == pytest.approx(float(difference_AO.mean()), rel=1e-5)


def outputs(model: nn.Module, name: str, example: Rendered) -> torch.Tensor:
    """Of one module, (A, O)."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    with torch.inference_mode():
        loss_of(model, example)
    handle.remove()
    return found[0][-len(example.answer_ids) :]


def test_single_and_leave_one_out_are_losses_of_plain_variants(bench: Bench) -> None:
    single, left_out = measure("single", bench), measure("leave_one_out", bench)
    before, after = mean_loss(bench, ORIGIN), mean_loss(bench, Variant.uniform(bench.names))
    for name in bench.names:
        assert single.scores[name] == pytest.approx(before - mean_loss(bench, Variant.uniform([name])), abs=1e-5)
        without = Variant.uniform(other for other in bench.names if other != name)
        assert left_out.scores[name] == pytest.approx(mean_loss(bench, without) - after, abs=1e-5)


def test_layers_grows_the_stretch_by_its_better_neighbour(bench: Bench) -> None:
    def loss(stretch: range) -> float:
        return mean_loss(bench, Variant.uniform(n for n in bench.names if bench.engine.pair.modules[n].layer in stretch))

    stretch = min((range(layer, layer + 1) for layer in range(3)), key=loss)
    order = [stretch.start]
    while len(order) < 3:
        grown = [range(stretch.start - 1, stretch.stop), range(stretch.start, stretch.stop + 1)]
        best = min((r for r in grown if r.start >= 0 and r.stop <= 3), key=loss)
        order += set(best) - set(stretch)
        stretch = best
    scores = measure("layers", bench).scores
    for name, score in scores.items():
        assert score == 3 - order.index(bench.engine.pair.modules[name].layer)


def test_weight_delta_is_a_ratio_of_norms(bench: Bench) -> None:
    scores = measure("weight_delta", bench).scores
    for name, graft in bench.engine.pair.grafts.items():
        target, source = graft.target.weight.double().numpy(), graft.source.weight.double().numpy()
        assert scores[name] == pytest.approx(np.linalg.norm(source - target) / np.linalg.norm(target), rel=1e-5)


@pytest.mark.parametrize("ranker", RESIDENT)
def test_bfloat16_gives_finite_scores(tmp_path: Path, ranker: str) -> None:
    measured = measure(ranker, make_bench(tiny_pair(tmp_path, "llama"), dtype="bfloat16"))
    assert np.isfinite(list(measured.scores.values())).all()


@pytest.mark.parametrize("ranker", ["attribution", "channel", "single"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, ranker: str) -> None:
    bench = make_bench(tiny_pair(tmp_path, "llama"))
    graft = bench.engine.pair.grafts["model.layers.1.mlp.up_proj"]
    (graft.target if ranker == "channel" else graft.source).weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="finite"):
        measure(ranker, bench)


def test_memory_that_runs_out_halves_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measure("attribution", bench)
    plain = resident_rankers._path_gradients

    def scarce(engine: Engine, examples: list[Rendered], steps: int) -> Any:
        if len(examples) > 2:
            raise RuntimeError("CUDA out of memory")
        return plain(engine, examples, steps)

    monkeypatch.setattr(resident_rankers, "_path_gradients", scarce)
    found = measure("attribution", bench)
    bench.engine.rows = 64
    np.testing.assert_allclose(list(found.scores.values()), list(expected.scores.values()), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_a_sample_is_a_weighted_mean_of_its_examples(num_examples: int, num_modules: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = tuple(f"m{i}" for i in range(num_modules))
    sample = Sample(names, rng.normal(size=(num_examples, num_modules)), rng.integers(1, 9, num_examples).astype(float))
    rows = [row for row, weight in zip(sample.values_EM, sample.weight_E, strict=True) for _ in range(int(weight))]
    np.testing.assert_allclose(list(sample.scores.values()), np.mean(rows, axis=0))
    assert sample.scores_of([0, 0])[names[0]] == pytest.approx(sample.values_EM[0, 0])
    assert Measured.of(sample).scores == sample.scores


@pytest.fixture(autouse=True)
def untouched(bench: Bench) -> Iterator[None]:
    yield
    assert bench.engine.pair.variant == ORIGIN
