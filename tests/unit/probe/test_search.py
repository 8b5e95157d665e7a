"""What searches lower, against slow readings of it: one example at a time through plain modules, and finite differences.

Shapes: S positions, V vocabulary, O output channels of a module.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draw import draw_variant
from tiny import DEAR_FAMILIES, EOS, VOCABULARY, tiny_pair, tiny_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from transplant_ray.errors import DataError, NumericsError, RecipeError
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.path import at_point
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.routed import routed_by
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.compare import Comparison
from transplant_ray.models.loading import load_model
from transplant_ray.probe import search as search_module
from transplant_ray.probe.resident_rankers import Bench
from transplant_ray.probe.search import Losses, Search, check_search, gradients, losses, step_share

PENALTY = 0.7
Gates = Mapping[str, torch.Tensor]


def draw_examples(count: int, seed: int) -> list[Rendered]:
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, rng.integers(1, most)).tolist())

    return [Rendered(f"e{seed}-{i}", (1, *tokens(9)), (*tokens(5), EOS), "") for i in range(count)]


def make_search(comparison: Comparison, rows: int = 64, dtype: str = "float64") -> Search:
    settings = GenerationSettings(4, (EOS,), batch_size=rows)
    engine = Engine(load_resident_pair(comparison, dtype), tiny_tokenizer(), settings, "exact")
    bench = Bench(engine, lambda: load_model(comparison.source, dtype), draw_examples(4, 1), 4)
    texts = [Rendered(example.id, (1,), example.prompt_ids, "") for example in draw_examples(3, 9)]
    return Search(bench, {"one": draw_examples(2, 2), "other": draw_examples(3, 3)}, texts)


@pytest.fixture(scope="module", params=DEAR_FAMILIES)
def comparison(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def search(comparison: Comparison) -> Search:
    return make_search(comparison)


@pytest.fixture(autouse=True)
def untouched(search: Search) -> Iterator[None]:
    yield
    pair = search.bench.engine.pair
    assert pair.variant == ORIGIN
    assert not any("forward" in graft.linear.__dict__ for graft in pair.grafts.values())
    assert not any(parameter.requires_grad for parameter in pair.model.parameters())


def pair_of(search: Search) -> ResidentPair:
    return search.bench.engine.pair


def answer_loss(model: nn.Module, example: Rendered) -> torch.Tensor:
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    logits_SV = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    return cross_entropy(logits_SV[len(example.prompt_ids) - 1 :], torch.tensor(example.answer_ids))


def text_logits(model: nn.Module, text: Rendered) -> torch.Tensor:
    """(S, V): what follows each token but the last."""
    ids = torch.tensor([[*text.prompt_ids, *text.answer_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def slow_losses(search: Search, model: nn.Module, said: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(task, guard) of a model; `said` are the target's logits of the texts."""
    task = torch.stack([answer_loss(model, example) for example in search.bench.examples]).mean()
    guards = [torch.stack([answer_loss(model, e) for e in examples]).mean() for examples in search.guards.values()]
    terms = []
    for text, target_SV in zip(search.texts, said, strict=True):
        p_SV = target_SV.softmax(-1)
        terms.append((p_SV * (p_SV.log() - text_logits(model, text).softmax(-1).log())).sum(-1))
    return task, torch.stack(guards).mean() + torch.cat(terms).mean()


def target_says(search: Search) -> list[torch.Tensor]:
    with torch.no_grad():
        return [text_logits(pair_of(search).model, text) for text in search.texts]


def slow_objective(search: Search, gates: Gates, said: Sequence[torch.Tensor]) -> torch.Tensor:
    with routed_by(pair_of(search), gates) as model:
        task, guard = slow_losses(search, model, said)
    return task + PENALTY * guard


def draw_gates(search: Search, unit: str, seed: int = 5) -> dict[str, torch.Tensor]:
    random_numbers = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand((module.num_channels,) if unit == "row" else (), generator=random_numbers, dtype=torch.float64)
        for name, module in pair_of(search).modules.items()
    }


def leaves(gates: Gates) -> dict[str, torch.Tensor]:
    return {name: gate.clone().requires_grad_() for name, gate in gates.items()}


@pytest.mark.parametrize("unit", ["row", "module"])
def test_gradients_are_finite_differences_of_the_objective(search: Search, unit: str) -> None:
    """Along random directions, and of single coefficients. `transformers` computes norms in float32, so differences are coarse."""
    gates, said = draw_gates(search, unit), target_says(search)
    found, step, rng = gradients(search, leaves(gates), PENALTY), 2e-3, random.Random(3)
    directions = [draw_gates(search, unit, seed) for seed in range(2)]
    for name in rng.sample(list(gates), 2):
        alone = {other: torch.zeros_like(gate) for other, gate in gates.items()}
        alone[name].view(-1)[int(found[name].abs().argmax())] = 1
        directions.append(alone)
    for direction in directions:
        ahead, behind = (
            slow_objective(search, {name: gate + side * step * direction[name] for name, gate in gates.items()}, said).detach()
            for side in (1, -1)
        )
        expected = float(ahead - behind) / (2 * step)
        assert sum(float((found[name] * direction[name]).sum()) for name in gates) == pytest.approx(expected, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("unit", ["row", "module"])
def test_gradients_are_those_through_both_products(search: Search, unit: str) -> None:
    gates = leaves(draw_gates(search, unit))
    slow_objective(search, gates, target_says(search)).backward()
    found = gradients(search, gates, PENALTY)
    expected = {name: gate.grad for name, gate in gates.items() if gate.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert expected.keys() == found.keys()
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest)


def test_a_point_keeps_one_tensor_of_a_module_and_no_output(search: Search) -> None:
    pair, kept = pair_of(search), []
    gates = leaves(draw_gates(search, "row"))
    name = next(name for name, module in pair.modules.items() if module.path.endswith(("down_proj", "c_proj")))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    width = pair.grafts[name].target.weight.shape[0 if pair.grafts[name].module.transposed else 1]
    x_BSI = torch.randn(2, 3, width, dtype=torch.float64)
    with at_point(pair, gates), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pair.grafts[name].linear(x_BSI)
    assert kept == [x_BSI.shape]


@pytest.mark.parametrize("what", ["target", "all", "random", "rows", "channels"])
def test_losses_are_those_of_plain_variants(search: Search, what: str) -> None:
    variants = [draw_variant(pair_of(search), random.Random(seed), what) for seed in range(2)]
    said = target_says(search)
    for variant, found in zip(variants, losses(search, variants), strict=True):
        with pair_of(search).grafted(variant) as model, torch.no_grad():
            task, guard = slow_losses(search, model, said)
        assert (found.task, found.guard) == (pytest.approx(float(task), rel=1e-5), pytest.approx(float(guard), rel=1e-5))


def test_the_target_does_not_diverge_from_itself(search: Search) -> None:
    alone = replace(search, guards={})
    (target, everything) = losses(alone, [ORIGIN, Variant.uniform(search.bench.names)])
    assert target.guard == 0
    assert everything.guard > 0.01


def test_without_guards_and_texts_the_guard_loss_is_0(search: Search) -> None:
    (found,) = losses(replace(search, guards={}, texts=()), [ORIGIN])
    assert found == Losses(losses(search, [ORIGIN])[0].task, 0.0)
    assert found.objective(3.0) == found.task


def test_nothing_guards_at_lambda_0(search: Search) -> None:
    gates = leaves(draw_gates(search, "row"))
    alone, guarded = (gradients(each, gates, 0.0) for each in (replace(search, guards={}, texts=()), search))
    assert all(torch.equal(alone[name], guarded[name]) for name in gates)


def test_batches_and_memory_that_runs_out_change_nothing(
    comparison: Comparison, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = leaves(draw_gates(search, "row"))
    expected = gradients(search, gates, PENALTY)
    one_by_one = gradients(make_search(comparison, rows=1), gates, PENALTY)
    plain = search_module._logits

    def scarce(engine: Engine, examples: Sequence[Rendered]) -> torch.Tensor:
        if len(examples) > 1 and torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory")
        return plain(engine, examples)

    monkeypatch.setattr(search_module, "_logits", scarce)
    halved = gradients(search, gates, PENALTY)
    search.bench.engine.rows = 64
    for name, gradient in expected.items():
        torch.testing.assert_close(one_by_one[name], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(halved[name], gradient, rtol=1e-4, atol=1e-7)


def test_logits_of_a_pass_are_few(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, plain = [], search_module._logits

    def counting(engine: Engine, examples: Sequence[Rendered]) -> torch.Tensor:
        sizes.append(len(examples))
        return plain(engine, examples)

    monkeypatch.setattr(search_module, "_logits", counting)
    monkeypatch.setattr(search_module, "LOGITS", 1)
    gradients(search, leaves(draw_gates(search, "module")), PENALTY)
    assert set(sizes) == {1}


def test_a_step_costs_what_it_reads(search: Search) -> None:
    def tokens(examples: Sequence[Rendered]) -> int:
        return sum(len(e.prompt_ids) + len(e.answer_ids) - 1 for e in examples)

    task, text = tokens(search.bench.examples), sum(len(text.answer_ids) for text in search.texts)
    whole = task + text + sum(map(tokens, search.guards.values()))
    assert step_share(search, 0.0) == (task / whole, task / whole)
    assert step_share(search, 1.0) == (1 + text / whole, 1.0)


# What is refused.


def test_a_penalty_without_effect_is_refused(search: Search) -> None:
    bare = replace(search, guards={}, texts=())
    with pytest.raises(RecipeError, match=r"`search\.gates\.penalty`: 0\.3 has no effect, .*search\.gates\.penalty=\[0\]"):
        check_search(bare, (0.0, 0.3), "search.gates")
    check_search(bare, (0.0,), "search.gates")
    check_search(replace(search, guards={}), (0.3,), "search.gates")
    check_search(replace(search, texts=()), (0.3,), "search.gates")


def test_a_guard_without_examples_is_refused(search: Search) -> None:
    with pytest.raises(DataError, match="guard empty: it has no probe examples"):
        check_search(replace(search, guards={"empty": []}), (1.0,), "search.gates")


def test_a_kind_that_matches_nothing_is_refused_by_its_key(search: Search) -> None:
    with pytest.raises(RecipeError, match=r"`search\.gates\.kind`: 'fnn' matches no compatible module"):
        search.modules("fnn", "search.gates.kind")


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    search = make_search(tiny_pair(tmp_path, "llama"))
    pair_of(search).grafts["model.layers.1.mlp.up_proj"].source.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        gradients(search, leaves(draw_gates(search, "module")), PENALTY)
