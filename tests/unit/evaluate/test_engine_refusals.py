"""What an engine cannot answer is refused before anything runs, or is the failure of one variant alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from draw import draw_examples, left_tokenizer
from tiny import EOS, tiny_pair

from transplant_ray import Engine
from transplant_ray.errors import CheckpointError, DataError
from transplant_ray.evaluate import engine as module
from transplant_ray.evaluate.example import Rendered, check_answers
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.evaluate.outcome import Outcome, score
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant

LIMIT = 6
POSITIONS = 128


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ResidentPair:
    return load_resident_pair(tiny_pair(tmp_path_factory.mktemp("gpt2"), "gpt2"), "float32")


@pytest.fixture(scope="module")
def examples() -> list[Rendered]:
    return draw_examples(random.Random(3), 5)


def make_engine(pair: ResidentPair, scorer: str = "exact") -> Engine:
    return Engine(pair, left_tokenizer(), GenerationSettings(LIMIT, (EOS,)), scorer)


def test_a_prompt_that_leaves_no_room_is_refused_and_the_last_that_does_is_answered(
    pair: ResidentPair, examples: list[Rendered]
) -> None:
    fits = replace(examples[0], id="fits", prompt_ids=(7,) * (POSITIONS - LIMIT))
    (shard,) = make_engine(pair).answer([ORIGIN], [*examples, fits])
    assert len(shard.outcomes) == len(examples) + 1
    too_long = replace(fits, id="long", prompt_ids=(7,) * (POSITIONS - LIMIT + 1))
    with pytest.raises(DataError, match=f"example long: 123 prompt tokens \\+ {LIMIT} new ones exceed the model's {POSITIONS}"):
        next(make_engine(pair).answer([ORIGIN], [*examples, too_long]))


@pytest.mark.parametrize("scorer", ["exact", "forced"])
def test_a_reference_that_leaves_no_room_is_refused_where_it_is_read(
    pair: ResidentPair, examples: list[Rendered], scorer: str
) -> None:
    long = replace(examples[0], id="long", answer_ids=(7,) * POSITIONS)
    engine = make_engine(pair, scorer)
    with pytest.raises(DataError, match="example"):
        engine.losses([ORIGIN], [*examples, long])
    if scorer == "forced":
        with pytest.raises(DataError, match="example"):
            next(engine.answer([ORIGIN], [*examples, long]))
    else:
        assert len(next(engine.answer([ORIGIN], [*examples, long])).outcomes) == len(examples) + 1


def test_what_breaks_on_one_variant_is_looked_for_variant_by_variant(
    pair: ResidentPair, examples: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = Variant.uniform(pair.modules), Variant.uniform(list(pair.modules)[:2])
    expected = {shard.variant: shard.outcomes for shard in make_engine(pair).answer([ORIGIN, good], examples)}

    def breaks(variant: str, *rest: object) -> Outcome:
        if variant == bad.id:
            raise RuntimeError("the device does not know this operator")
        return score(variant, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "score", breaks)
    shards = {shard.variant: shard for shard in make_engine(pair).answer([ORIGIN, bad, good], examples)}
    assert shards[bad.id].error == "RuntimeError: the device does not know this operator"
    assert {name: shards[name].outcomes for name in expected} == expected


def test_references_that_can_never_be_right_are_refused(examples: list[Rendered]) -> None:
    sized = [replace(example, answer_ids=(7, 8, EOS)) for example in examples]
    check_answers(sized, 3, (EOS,))
    with pytest.raises(DataError, match=r"has 3 tokens with its end, and `task\.max_new_tokens` is 2.*Use task\.max_new_tokens=3"):
        check_answers(sized, 2, (EOS,))
    with pytest.raises(DataError, match="no end token"):
        check_answers([*sized, replace(sized[0], answer_ids=(7, 8))], 3, (EOS,))


def test_an_engine_is_loaded_from_two_names(tmp_path: Path) -> None:
    tiny_pair(tmp_path, "llama")
    engine = Engine.load(str(tmp_path / "source"), str(tmp_path / "target"), max_new_tokens=4)
    examples = engine.examples({"1+2=": "3", "2+2=": "4"})
    assert [example.answer for example in examples] == ["3", "4"]
    assert [len(shard.outcomes) for shard in engine.answer([ORIGIN, Variant.uniform(engine.pair.modules)], examples)] == [2, 2]
    with pytest.raises(CheckpointError):
        Engine.load(str(tmp_path / "source"), str(tmp_path / "nobody"), max_new_tokens=4)
