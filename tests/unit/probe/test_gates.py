"""Gates: they stay in [0, 1], repeat, do what λ says, and a fit of rows finds what was hidden in rows.

Shapes: S positions, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import draw_prompts, draw_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEAR_FAMILIES, EOS, save_tiny, tiny_pair, tiny_tokenizer

from transplant_ray.errors import RecipeError
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.catalogue import select_kind
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.loading import load_model
from transplant_ray.probe import gates
from transplant_ray.probe.gates import as_variant, descend, fit_gates, round_gates, start_gates
from transplant_ray.probe.resident_rankers import Bench
from transplant_ray.probe.search import Losses, Search, losses
from transplant_ray.recipe import GatesSpec

FEW = {"steps": 6, "learning_rate": 0.15}


@torch.inference_mode()
def said_by(pair: ResidentPair, variant: Variant, prompts: Sequence[Sequence[int]]) -> list[Rendered]:
    """Examples whose references are what the variant finds best, token by token."""
    examples = []
    with pair.grafted(variant) as model:
        for place, prompt in enumerate(prompts):
            best_S = model(input_ids=torch.tensor([[1, *prompt]]), use_cache=False).logits[0].argmax(-1).tolist()
            examples.append(Rendered(f"{variant.id}-{place}", (1, *prompt[:-2]), (*best_S[-3:],), ""))
    return examples


def make_search(comparison: Comparison, hidden: str = "rows", dtype: str = "float32") -> Search:
    """The task is what a hidden variant says, the guard what the target says."""
    pair = load_resident_pair(comparison, dtype)
    engine = Engine(pair, tiny_tokenizer(), GenerationSettings(4, (EOS,)), "exact")
    rng = random.Random(2)
    task = said_by(pair, draw_variant(pair, rng, hidden), [[*prompt, 5, 6] for prompt in draw_prompts(rng, 6, 8)])
    guard = said_by(pair, ORIGIN, [[*prompt, 7, 8] for prompt in draw_prompts(rng, 4, 8)])
    texts = [Rendered(f"text {i}", (1,), (*prompt, 4), "") for i, prompt in enumerate(draw_prompts(rng, 4, 8))]
    return Search(Bench(engine, lambda: load_model(comparison.source, dtype), task, 4), {"held": guard}, texts)


@pytest.fixture(scope="module", params=DEAR_FAMILIES)
def search(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Search:
    return make_search(tiny_pair(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return make_search(tiny_pair(tmp_path_factory.mktemp("llama"), "llama"))


def both_ends(search: Search) -> list[Losses]:
    return losses(search, [ORIGIN, Variant.uniform(search.bench.names)])


def test_a_fit_of_rows_finds_most_of_what_was_hidden_in_rows(search: Search) -> None:
    target, everything = both_ends(search)
    (found,) = fit_gates(replace(search, guards={}, texts=()), GatesSpec(unit="row", penalty=(0.0,), steps=40))
    assert found.task_loss_before_rounding < 0.5 * min(target.task, everything.task)
    assert found.task_loss < 0.9 * min(target.task, everything.task)
    assert found.num_coefficients == sum(module.num_channels for module in search.bench.engine.pair.modules.values())


def test_losses_and_cost_of_a_result_are_those_of_its_variant(search: Search) -> None:
    spec = GatesSpec(unit="row", penalty=(0.0, 1.0), **FEW)
    for found in fit_gates(search, spec):
        (again,) = losses(search, [found.variant])
        assert (found.task_loss, found.guard_loss) == (pytest.approx(again.task), pytest.approx(again.guard))
        assert found.cost.backwards == pytest.approx(spec.steps, rel=0 if found.penalty else 0.99)
        assert found.cost.forwards > found.cost.backwards
        assert found.cost.seconds > 0
        values = {c for each in found.variant.coefficients.values() for c in (each if isinstance(each, tuple) else (each,))}
        assert values <= {0.0, 1.0}


@settings(max_examples=4, deadline=None)
@given(st.floats(0.05, 1), st.sampled_from(["row", "module"]), st.sampled_from([0.0, 2.0]))
def test_gates_stay_in_their_range_and_meet_its_ends(llama: Search, rate: float, unit: str, penalty: float) -> None:
    seen, plain = [], gates.gradients

    def looking(search: Search, now: gates.Gates, penalty: float) -> dict[str, torch.Tensor]:
        seen.extend(gate.detach().clone().flatten() for gate in now.values())
        return {name: 50 * gradient for name, gradient in plain(search, now, penalty).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "gradients", looking)
        spec = GatesSpec(unit=unit, steps=12, learning_rate=rate)
        end = descend(llama, start_gates(llama, llama.bench.names, unit), spec, penalty)
    values = torch.cat([*seen, *(gate.flatten() for gate in end.values())])
    assert ((values >= 0) & (values <= 1)).all()
    assert (values == 0).any()
    assert (values == 1).any()


def test_a_fit_repeats_and_does_not_depend_on_the_rest_of_the_grid(llama: Search) -> None:
    first, second = fit_gates(llama, GatesSpec(penalty=(0.5, 2.0), **FEW))
    (again,) = fit_gates(llama, GatesSpec(penalty=(2.0,), **FEW))
    assert (again.variant, again.task_loss, again.task_loss_before_rounding) == (
        second.variant,
        second.task_loss,
        second.task_loss_before_rounding,
    )
    assert first.variant != second.variant
    assert (first.penalty, second.penalty) == (0.5, 2.0)


def test_without_a_penalty_guards_make_no_difference(llama: Search) -> None:
    spec = GatesSpec(penalty=(0.0,), **FEW)
    (guarded,), (alone,) = fit_gates(llama, spec), fit_gates(replace(llama, guards={}, texts=()), spec)
    assert guarded.variant == alone.variant
    assert guarded.guard_loss > 0
    assert alone.guard_loss == 0


@pytest.mark.parametrize("unit", ["row", "module"])
def test_a_large_penalty_stays_at_the_target(search: Search, unit: str) -> None:
    """Divergence is 0 there and nowhere else."""
    free, bound = fit_gates(replace(search, guards={}), GatesSpec(unit=unit, penalty=(0.0, 1e4), steps=40))
    assert bound.guard_loss_before_rounding < 0.1 * free.guard_loss_before_rounding
    assert bound.guard_loss < free.guard_loss
    assert bound.task_loss > free.task_loss


@pytest.mark.parametrize("unit", ["row", "module"])
def test_equal_models_stay_as_they_are(tmp_path: Path, unit: str) -> None:
    folder = save_tiny(tmp_path / "model", "llama", seed=2)
    same = make_search(compare(open_checkpoint(str(folder)), open_checkpoint(str(folder))))
    end = descend(same, start_gates(same, same.bench.names, unit), GatesSpec(unit=unit, **FEW), 1.0)
    assert all((gate == gates.START).all() for gate in end.values())
    (found,) = fit_gates(same, GatesSpec(unit=unit, penalty=(1.0,), **FEW))
    assert found.variant == ORIGIN


def test_only_modules_of_the_kind_are_fitted(llama: Search) -> None:
    modules = llama.bench.engine.pair.modules
    ffn = {module.name for module in select_kind(modules.values(), "ffn")}
    for unit, count in (("module", len(ffn)), ("row", sum(modules[name].num_channels for name in ffn))):
        (found,) = fit_gates(llama, GatesSpec(unit=unit, penalty=(0.0,), kind="ffn", **FEW))
        assert found.variant.coefficients
        assert found.variant.coefficients.keys() <= ffn
        assert found.num_coefficients == count


def test_what_has_no_effect_is_refused(llama: Search) -> None:
    with pytest.raises(RecipeError, match=r"`search\.gates\.kind`: 'fnn' matches"):
        fit_gates(llama, GatesSpec(kind="fnn"))
    with pytest.raises(RecipeError, match=r"`search\.gates\.penalty`: 3 has no effect"):
        fit_gates(replace(llama, guards={}, texts=()), GatesSpec())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=1, max_size=5))
def test_rounding_takes_what_is_over_half_and_names_whole_modules_by_a_number(values: list[float]) -> None:
    variant = round_gates({"a": torch.tensor(values), "b": torch.tensor(values[0])})
    open_rows = tuple(float(value > 0.5) for value in values)
    whole = {(0.0,) * len(values): None, (1.0,) * len(values): 1.0}
    assert variant.coefficients.get("a") == whole.get(open_rows, open_rows)
    assert variant.coefficients.get("b") == (1.0 if values[0] > 0.5 else None)
    assert as_variant({"a": torch.full((3,), 0.25)}) == Variant({"a": 0.25})


def test_bfloat16_is_fitted_in_float32(tmp_path: Path) -> None:
    search = make_search(tiny_pair(tmp_path, "llama"), dtype="bfloat16")
    start = start_gates(search, search.bench.names, "row")
    assert {gate.dtype for gate in start.values()} == {torch.float32}
    target, everything = both_ends(search)
    (found,) = fit_gates(replace(search, guards={}, texts=()), GatesSpec(penalty=(0.0,), steps=20))
    assert found.task_loss_before_rounding < min(target.task, everything.task)
