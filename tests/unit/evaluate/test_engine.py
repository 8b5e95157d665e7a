"""The engine: many variants at once, each as if it were alone, and what goes wrong with one stays with that one."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from draw import HARD, draw_examples, draw_variant, left_tokenizer, plain_answers, share_of_close
from tiny import EOS, tiny_pair
from transformers import PreTrainedModel

from transplant_ray.errors import DeviceError, VariantError
from transplant_ray.evaluate import engine as module
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.decode import Decoded, decode
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.read import read
from transplant_ray.evaluate.scorers import FORCED
from transplant_ray.evaluate.task import Rendered
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Coefficient, Variant

SETTINGS = GenerationSettings(6, (EOS, 5, 9), batch_size=8)
SCORERS = ("exact", FORCED)


@pytest.fixture(scope="module")
def examples() -> list[Rendered]:
    return draw_examples(random.Random(1), 6)


def pack(pair: ResidentPair) -> list[Variant]:
    rng = random.Random(2)
    return [ORIGIN, *(draw_variant(pair, rng, what) for what in ("nested", "random")), Variant.uniform(pair.modules)]


def make_engine(pair: ResidentPair, scorer: str = "exact", note: Callable[[str], None] = lambda _: None) -> Engine:
    return Engine(pair, left_tokenizer(), SETTINGS, scorer, note)


def answers(engine: Engine, variants: Sequence[Variant], examples: Sequence[Rendered]) -> dict[str, VariantShard]:
    shards = list(engine.answer(variants, examples))
    assert sorted(shard.variant for shard in shards) == sorted(variant.id for variant in variants)
    assert all(not shard.outcomes if shard.error else len(shard.outcomes) == len(examples) for shard in shards)
    return {shard.variant: shard for shard in shards}


def assert_as_alone(pair: ResidentPair, variant: Variant, examples: Sequence[Rendered], shard: VariantShard, scorer: str) -> None:
    assert shard.error is None
    with pair.grafted(variant) as model:
        expected = plain_answers(variant, model, examples, SETTINGS, scorer)
    assert share_of_close(shard.outcomes, expected) < 0.5


# Every variant is answered as if it were alone.


@pytest.mark.parametrize("scorer", SCORERS)
def test_all_variants_are_answered_in_the_order_of_the_examples(pair: ResidentPair, examples: list[Rendered], scorer: str) -> None:
    found = answers(make_engine(pair, scorer), pack(pair), examples)
    for variant in pack(pair):
        assert_as_alone(pair, variant, examples, found[variant.id], scorer)
    assert len({shard.outcomes for shard in found.values()}) == len(found)


def test_seconds_are_shared_among_the_variants(pair: ResidentPair, examples: list[Rendered]) -> None:
    start = time.perf_counter()
    found = answers(make_engine(pair), pack(pair), examples)
    elapsed = time.perf_counter() - start
    assert all(shard.seconds > 0 for shard in found.values())
    assert sum(shard.seconds for shard in found.values()) <= elapsed


def test_an_engine_that_is_left_in_the_middle_leaves_the_target(pair: ResidentPair, examples: list[Rendered]) -> None:
    results = make_engine(pair).answer(pack(pair), examples)
    next(results)
    assert any("forward" in part.__dict__ for part in pair.model.modules())
    results.close()
    assert not any("forward" in part.__dict__ for part in pair.model.modules())


def test_a_model_that_cannot_be_decoded_generates(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_decode", lambda _: False)
    monkeypatch.setattr(module, "decode", None)
    found = answers(make_engine(pair), pack(pair), examples)
    for variant in pack(pair):
        assert_as_alone(pair, variant, examples, found[variant.id], "exact")


@pytest.mark.parametrize("coefficient", [1.5, -0.25])
def test_coefficients_past_the_ends_are_what_a_blend_gives(
    pair: ResidentPair, examples: list[Rendered], coefficient: float
) -> None:
    meant = Variant.uniform(list(pair.modules)[:4], coefficient, extrapolate=True)
    found = answers(make_engine(pair), [*pack(pair), meant], examples)
    assert_as_alone(pair, meant, examples, found[meant.id], "exact")
    assert found[meant.id].outcomes != found[ORIGIN.id].outcomes
    assert make_engine(pair).losses([meant, ORIGIN], examples)[meant.id] == pytest.approx(
        mean_loss(pair, meant, examples), rel=1e-4
    )


# One that fails.


def channels(pair: ResidentPair) -> dict[str, Coefficient]:
    return {next(iter(pair.modules)): (1.0, 0.0)}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda _: {"model.layers.9.mlp.down_proj": 1.0}, "VariantError: .*layers.9.mlp.down_proj is not a compatible module"),
        (lambda pair: dict.fromkeys(pair.modules, 1.5), r"VariantError: .* coefficient 1\.5; expected a number in \[0, 1\]"),
        (channels, "VariantError: .* 2 coefficients, expected 1 or its"),
    ],
)
def test_a_variant_that_does_not_fit_fails_alone(
    pair: ResidentPair, examples: list[Rendered], bad: Callable[[ResidentPair], dict[str, Coefficient]], words: str
) -> None:
    variants = pack(pair)
    wrong = Variant(bad(pair))
    found = answers(make_engine(pair), [*variants[:2], wrong, *variants[2:]], examples)
    error = found[wrong.id].error
    assert error is not None
    assert re.match(words, error)
    for variant in variants:
        assert_as_alone(pair, variant, examples, found[variant.id], "exact")
    assert answers(make_engine(pair), [wrong], examples)[wrong.id].error == error


@pytest.fixture
def huge(resident: ResidentPair) -> Iterator[Variant]:
    """A variant whose numbers overflow, with weights that are all finite."""
    name = next(name for name in resident.modules if name.endswith("1.mlp.gate_up_proj"))
    weight = resident.grafts[name].source.weight
    kept = weight.clone()
    weight.copy_(weight.sign() * 3e38)
    assert weight.isfinite().all()
    yield Variant({name: 1.0})
    weight.copy_(kept)


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_variant_whose_logits_are_nan_fails_alone(
    pair: ResidentPair, examples: list[Rendered], huge: Variant, monkeypatch: pytest.MonkeyPatch, scorer: str, decodes: bool
) -> None:
    variants = [variant for variant in pack(pair) if not huge.coefficients.keys() & variant.coefficients.keys()]
    assert len(variants) > 1
    monkeypatch.setattr(module, "can_decode", lambda _: decodes)
    found = answers(make_engine(pair, scorer), [huge, *variants], examples)
    assert str(found[huge.id].error).startswith("NumericsError: generation: NaN logits")
    for variant in variants:
        assert_as_alone(pair, variant, examples, found[variant.id], scorer)


# Memory that runs out.


@dataclass
class Limited:
    """A forward that fails above a number of rows, after some calls that still work."""

    most: int
    error: type[RuntimeError] = torch.OutOfMemoryError
    words: str = "CUDA out of memory. Tried to allocate 2.00 GiB."
    spare: int = 0
    notes: list[str] = field(default_factory=list)
    calls: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """Of `decode`: prompts, rows, and those that it answered."""

    def put_on(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = type(model).forward

        @wraps(forward)
        def limited(*args: object, input_ids: torch.Tensor, **kwargs: object) -> object:
            self.spare -= 1
            if self.spare < 0 and len(input_ids) > self.most:
                raise self.error(self.words)
            return forward(*args, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(type(model), "forward", limited)
        monkeypatch.setattr(module, "decode", self.decode)

    def decode(self, *args: object) -> Iterator[Decoded]:
        answered: list[int] = []
        self.calls.append((len(args[2]), args[5], answered))  # type: ignore[arg-type]
        for index, completion in decode(*args):  # type: ignore[arg-type]
            answered.append(index)
            yield index, completion


CPU = {"error": RuntimeError, "words": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"}


@pytest.mark.parametrize("limit", [{}, CPU])
@pytest.mark.parametrize("scorer", SCORERS)
def test_out_of_memory_halves_the_rows_and_changes_no_answer(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch, scorer: str, limit: dict[str, object]
) -> None:
    expected = answers(make_engine(pair, scorer), pack(pair), examples)
    limited = Limited(most=2, **limit)  # type: ignore[arg-type]
    limited.put_on(pair.model, monkeypatch)
    engine = make_engine(pair, scorer, limited.notes.append)
    for _ in range(2):  # the second time it starts with what is left
        found = answers(engine, pack(pair), examples)
        for name, shard in found.items():
            assert share_of_close(shard.outcomes, [replace(o, num_close=0) for o in expected[name].outcomes]) < 0.5
        assert engine.rows == 2
        assert [note.split(" rows")[0] for note in limited.notes] == ["out of memory: 4", "out of memory: 2"]


@pytest.mark.parametrize("spare", [0, 6, 14])
def test_what_is_answered_is_not_answered_again(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    limited = Limited(most=3, spare=spare)
    limited.put_on(pair.model, monkeypatch)
    found = answers(make_engine(pair), pack(pair), examples)
    assert all(shard.error is None for shard in found.values())
    sizes, rows, answered = zip(*limited.calls, strict=True)
    assert rows == (8, 4, 2)
    assert sum(map(len, answered)) == sizes[0] == len(found) * len(examples)
    assert list(sizes[1:]) == [size - len(some) for size, some in zip(sizes, answered, strict=True)][:-1]
    assert bool(answered[0]) == (spare > 0)


def test_a_row_that_finds_no_memory_is_an_error_of_all_and_no_endless_loop(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = Limited(most=0)
    limited.put_on(pair.model, monkeypatch)
    found = answers(make_engine(pair, note=limited.notes.append), pack(pair), examples)
    assert all(
        str(shard.error).startswith("ResourceError: evaluation: out of memory with a single row") for shard in found.values()
    )
    assert len(limited.notes) == 3


def test_another_error_is_that_of_the_variants_that_are_not_done(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = Limited(most=0, error=RuntimeError, words="cuBLAS is gone", spare=12)
    limited.put_on(pair.model, monkeypatch)
    engine = make_engine(pair, note=limited.notes.append)
    found = answers(engine, pack(pair), examples)
    errors = {shard.error for shard in found.values()}
    assert errors == {None, "RuntimeError: cuBLAS is gone"}
    assert (engine.rows, limited.notes) == (8, [])
    monkeypatch.undo()
    for variant in pack(pair):
        if found[variant.id].error is None:
            assert_as_alone(pair, variant, examples, found[variant.id], "exact")


# Losses.


def mean_loss(pair: ResidentPair, variant: Variant, examples: Sequence[Rendered]) -> float:
    with pair.grafted(variant) as model:
        readings = [reading for _, reading in read(model, left_tokenizer(), examples, SETTINGS, lambda _: None, 1)]
    return sum(reading.loss for reading in readings if reading) / len(examples)


@pytest.mark.parametrize("what", ["answer", "losses", "divergences"])
def test_a_device_that_fails_is_no_variants_fault(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """After it all calls of the process fail: each variant that comes would be failed, and faster than others work."""
    Limited(0, RuntimeError, "CUDA error: an illegal memory access was encountered").put_on(pair.model, monkeypatch)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(DeviceError, match="no longer computes: CUDA error"):
        list(getattr(make_engine(pair), what)(pack(pair), examples))


def test_losses_are_means_over_examples_by_pointer(pair: ResidentPair, examples: list[Rendered]) -> None:
    rng = random.Random(3)
    variants = [draw_variant(pair, rng, what) for what in (*HARD, "alpha", "channels", "mixed")]
    found = make_engine(pair).losses(variants, examples)
    assert found.keys() == {variant.id for variant in variants}
    for variant in variants:
        assert found[variant.id] == pytest.approx(mean_loss(pair, variant, examples), rel=1e-4)


def test_a_loss_that_is_no_number_is_none(pair: ResidentPair, examples: list[Rendered], huge: Variant) -> None:
    found = make_engine(pair).losses([ORIGIN, huge], examples)
    assert found == {ORIGIN.id: pytest.approx(mean_loss(pair, ORIGIN, examples), rel=1e-4), huge.id: None}


def test_losses_find_memory_as_answers_do(pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_engine(pair).losses(pack(pair), examples)
    limited = Limited(most=2)
    limited.put_on(pair.model, monkeypatch)
    assert make_engine(pair).losses(pack(pair), examples) == pytest.approx(expected, rel=1e-4)


def test_losses_that_find_no_memory_at_all_are_none(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    Limited(0).put_on(pair.model, monkeypatch)
    assert set(make_engine(pair).losses(pack(pair), examples).values()) == {None}


def test_modules_that_mix_rows_have_losses_too(examples: list[Rendered], tmp_path: Path) -> None:
    opt = load_resident_pair(tiny_pair(tmp_path, "opt"), "float32")
    found = make_engine(opt).losses(pack(opt), examples)
    assert found == {variant.id: pytest.approx(mean_loss(opt, variant, examples), rel=1e-4) for variant in pack(opt)}


def test_losses_of_a_variant_that_does_not_fit_are_refused(pair: ResidentPair, examples: list[Rendered]) -> None:
    with pytest.raises(VariantError, match="not a compatible module"):
        make_engine(pair).losses([ORIGIN, Variant({"model.layers.9.mlp.down_proj": 1.0})], examples)
