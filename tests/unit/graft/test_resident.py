"""The resident pair: variants go in and come out by pointer, and the target is there again bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import save_tiny, tiny_model, tiny_pair
from torch import nn
from transformers import PreTrainedModel

from transplant_ray.errors import VariantError
from transplant_ray.graft import resident
from transplant_ray.graft.resident import ResidentPair, Weights, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant, blend
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare

DrawVariant = Callable[[Comparison, int, str], Variant]
IDS = torch.tensor([[1, 5, 17, 30, 8, 41]])


@dataclass(frozen=True)
class Photo:
    """All parameters of a model: the objects, where their numbers are, and a copy of the numbers."""

    parameters: dict[str, nn.Parameter]
    places: dict[str, int]
    numbers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Photo:
        parameters = dict(model.named_parameters())
        numbers = {name: p.detach().clone() for name, p in model.state_dict().items()}
        return cls(parameters, {name: p.data_ptr() for name, p in parameters.items()}, numbers)

    def check(self, model: nn.Module) -> None:
        now = Photo.of(model)
        assert list(now.numbers) == list(self.numbers)
        assert now.places == self.places
        assert all(now.parameters[name] is parameter for name, parameter in self.parameters.items())
        assert all(torch.equal(now.numbers[name], numbers) for name, numbers in self.numbers.items())


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def pair(comparison: Comparison) -> ResidentPair:
    return load_resident_pair(comparison, "float32")


@pytest.fixture(scope="module")
def shared_pair(comparison: Comparison) -> ResidentPair:
    """For properties of many examples; each begins with undo."""
    return load_resident_pair(comparison, "float32")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Modules whose parameters are set, in order."""
    seen: list[nn.Module] = []
    register = nn.Module.register_parameter

    def record(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        seen.append(module)
        register(module, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", record)
    return seen


@pytest.mark.parametrize("what", ["hard", "alpha", "channels", "mixed"])
def test_undo_gives_back_the_targets_bytes(
    pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, what: str
) -> None:
    photo, before = Photo.of(pair.model), logits(pair.model)
    pair.apply(draw_variant(comparison, 1, what))
    assert not torch.equal(logits(pair.model), before)
    pair.undo()
    photo.check(pair.model)
    assert pair.variant == ORIGIN


def test_the_target_is_back_after_an_exception(pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant) -> None:
    photo, variant = Photo.of(pair.model), draw_variant(comparison, 2, "mixed")

    def fail_inside() -> None:
        with pair.grafted(variant) as model:
            assert model is pair.model
            assert pair.variant == variant
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    photo.check(pair.model)


def test_moving_on_touches_only_modules_that_differ(
    pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, touched: list[nn.Module]
) -> None:
    variants = [draw_variant(comparison, seed, "hard") for seed in range(4)]
    for old, new in zip([ORIGIN, *variants], [*variants, ORIGIN], strict=True):
        touched.clear()
        pair.apply(new)
        differing = {name for name in comparison.pairs if old.coefficients.get(name, 0) != new.coefficients.get(name, 0)}
        assert {id(module) for module in touched} == {id(pair.model.get_submodule(name)) for name in differing}
        assert len(touched) <= 2 * len(differing)  # a weight and a bias


def test_the_same_variant_again_touches_nothing(
    pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, touched: list[nn.Module]
) -> None:
    variant = draw_variant(comparison, 3, "mixed")
    pair.apply(variant)
    touched.clear()
    pair.apply(Variant(dict(variant.coefficients)))
    assert touched == []


def by_hand(comparison: Comparison, dtype: torch.dtype = torch.float32) -> tuple[ResidentPair, dict[str, Weights]]:
    """A pair from two models that we hold ourselves, and the source's weights."""
    family = comparison.target.config.model_type
    source, target = tiny_model(family, 1, dtype), tiny_model(family, 2)
    linears = {name: source.get_submodule(name) for name in comparison.pairs}
    weights = {name: Weights(linear.weight, linear.bias) for name, linear in linears.items()}
    return ResidentPair(target, weights, {m.name: m for m in comparison.modules}), weights


def test_a_hard_variant_copies_no_weights(comparison: Comparison, draw_variant: DrawVariant) -> None:
    pair, source = by_hand(comparison)
    target = Photo.of(pair.model)
    variant = draw_variant(comparison, 4, "hard")
    pair.apply(variant)
    for name in comparison.pairs:
        linear = pair.model.get_submodule(name)
        if name in variant.coefficients:
            assert linear.weight is source[name].weight
            assert linear.bias is source[name].bias
        else:
            assert linear.weight.data_ptr() == target.places[f"{name}.weight"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 5), min_size=2, max_size=5))
def test_the_way_to_a_variant_does_not_matter(
    shared_pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, seeds: list[int]
) -> None:
    variants = [draw_variant(comparison, seed, "mixed") for seed in seeds]
    shared_pair.undo()
    shared_pair.apply(variants[-1])
    direct = logits(shared_pair.model)
    shared_pair.undo()
    for variant in variants:
        shared_pair.apply(variant)
    assert torch.equal(logits(shared_pair.model), direct)


@pytest.mark.parametrize(
    "bad", [{"model.layers.0.nothing": 1.0}, {"first": 1.5}, {"first": (1.0,)}], ids=["unknown", "range", "channels"]
)
def test_a_variant_that_fails_its_check_changes_nothing(
    pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, bad: dict[str, float]
) -> None:
    variant = draw_variant(comparison, 5, "hard")
    pair.apply(variant)
    photo = Photo.of(pair.model)
    first, second = list(comparison.pairs)[:2]
    with pytest.raises(VariantError):
        pair.apply(Variant({second: 0.5, **{first if name == "first" else name: c for name, c in bad.items()}}))
    photo.check(pair.model)
    assert pair.variant == variant


def test_a_failure_on_the_way_leaves_no_half_variant(
    pair: ResidentPair, comparison: Comparison, draw_variant: DrawVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a blend finds no memory: the next variant must not inherit what was set before it."""
    photo, after = Photo.of(pair.model), draw_variant(comparison, 7, "hard")
    pair.apply(after)
    expected = logits(pair.model)
    pair.undo()
    with monkeypatch.context() as patch:
        patch.setattr(resident, "blend", out_of_memory_after(3))
        with pytest.raises(RuntimeError, match="out of memory"):
            pair.apply(draw_variant(comparison, 6, "alpha"))
    pair.apply(after)
    assert torch.equal(logits(pair.model), expected)
    pair.undo()
    photo.check(pair.model)


def out_of_memory_after(num_blends: int) -> Callable[..., torch.Tensor]:
    """`blend` for so many blends; both ends, which take no memory, always work."""
    left = iter(range(num_blends))

    def blend_or_fail(target: torch.Tensor, source: torch.Tensor, coefficient: Coefficient, *, transposed: bool) -> torch.Tensor:
        if coefficient not in (0, 1) and next(left, None) is None:
            raise RuntimeError("out of memory")
        return blend(target, source, coefficient, transposed=transposed)

    return blend_or_fail


def test_weights_of_another_form_are_refused(llama: Comparison) -> None:
    pair, source = by_hand(llama)
    name = next(iter(source))
    modules = {name: llama.pairs[name].target}
    good = source[name].weight
    wrong = {
        r"weight is \(\(32, 32\), torch.bfloat16": Weights(nn.Parameter(good.bfloat16()), None),
        r"weight is \(\(32, 31\)": Weights(nn.Parameter(good[:, 1:]), None),
        "only one of source and target has a bias": Weights(good, nn.Parameter(torch.zeros(32))),
    }
    for words, weights in wrong.items():
        with pytest.raises(VariantError, match=f"{name}: .*{words}"):
            ResidentPair(pair.model, {name: weights}, modules)


def test_a_missing_bias_is_refused(tmp_path: Path) -> None:
    gpt2 = tiny_pair(tmp_path, "gpt2")
    pair, source = by_hand(gpt2)
    name = next(iter(source))
    with pytest.raises(VariantError, match=f"{name}: only one of source and target has a bias"):
        ResidentPair(pair.model, {name: replace(source[name], bias=None)}, {name: gpt2.pairs[name].target})


def test_only_the_named_modules_are_loaded(llama: Comparison) -> None:
    first, second = list(llama.pairs)[:2]
    pair = load_resident_pair(llama, "float32", names=frozenset({first}))
    pair.apply(Variant({first: 1.0}))
    with pytest.raises(VariantError, match=f"{second} is not a compatible module"):
        pair.apply(Variant({second: 1.0}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_is_loaded_in_the_dtype_that_was_asked_for(llama: Comparison, dtype: str) -> None:
    pair = load_resident_pair(llama, dtype)
    pair.apply(Variant.uniform(llama.pairs, 0.5))
    assert {parameter.dtype for parameter in pair.model.parameters()} == {getattr(torch, dtype)}


def test_source_weights_are_rounded_as_the_targets_files_will_round_them(tmp_path: Path) -> None:
    """The dtype of the target's files is kept on export, so a finer source is rounded; resident numbers must be those."""
    source = save_tiny(tmp_path / "source", seed=1)
    tiny_model("llama", 2, torch.bfloat16).save_pretrained(tmp_path / "target")
    both = compare(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "target")))
    pair = load_resident_pair(both, "float32")
    pair.apply(Variant.uniform(both.pairs))
    for name in both.pairs:
        weight = pair.model.get_submodule(name).weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, tiny_model("llama", 1).get_submodule(name).weight.bfloat16().float())
