"""A model that `accelerate` spreads over devices has forwards of accelerate's own on its modules. There is one device here, so the
hooks are forced; what they move goes nowhere, and everything else is as on several GPUs."""

from __future__ import annotations

from collections import Counter

import pytest
from tiny import EOS, tiny_pair, tiny_tokenizer

from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison
from transplant_ray.models.loading import load_model
from transplant_ray.probe.resident_rankers import RESIDENT, Bench, measure
from transplant_ray.probe.statistics import ActivationStats, stream_stats

accelerate = pytest.importorskip("accelerate")

EXAMPLES = [Rendered(f"e{i}", (1, *range(4, 6 + i)), (7 + i, 9, EOS), "") for i in range(4)]
SETTINGS = GenerationSettings(5, (EOS,), batch_size=16)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture
def plain(comparison: Comparison) -> ResidentPair:
    return load_resident_pair(comparison, "float32")


@pytest.fixture
def dispatched(comparison: Comparison) -> ResidentPair:
    pair = load_resident_pair(comparison, "float32")
    devices = {"model.embed_tokens": "cpu", **{f"model.layers.{layer}": "cpu" for layer in range(3)}}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(pair.model, devices, force_hooks=True)
    kept = Counter(type(getattr(graft.linear, "_hf_hook", None)).__name__ for graft in pair.grafts.values())
    assert set(kept) == {"AlignDevicesHook"}
    return pair


def answers(pair: ResidentPair, scorer: str) -> dict[str, list[str]]:
    names = sorted(pair.grafts)
    variants = [Variant({}), Variant.uniform(names[::2]), Variant.uniform(names, 0.5), Variant.uniform(names)]
    shards = Engine(pair, tiny_tokenizer(), SETTINGS, scorer).answer(variants, EXAMPLES)
    return {shard.variant: [outcome.completion for outcome in shard.outcomes] for shard in shards}


@pytest.mark.parametrize("scorer", ["exact", "forced"])
def test_variants_say_the_same(plain: ResidentPair, dispatched: ResidentPair, scorer: str) -> None:
    expected = answers(plain, scorer)
    assert answers(dispatched, scorer) == expected
    assert len(expected) == 4
    assert all(len(said) == len(EXAMPLES) for said in expected.values())


@pytest.mark.parametrize("ranker", RESIDENT)
def test_rankers_score_the_same(comparison: Comparison, plain: ResidentPair, dispatched: ResidentPair, ranker: str) -> None:
    def scores(pair: ResidentPair) -> dict[str, float]:
        engine = Engine(pair, tiny_tokenizer(), SETTINGS, "exact")
        bench = Bench(engine, lambda: load_model(comparison.source, "float32"), EXAMPLES, 2)
        return dict(measure(ranker, bench).scores)

    assert scores(dispatched) == pytest.approx(scores(plain))


def test_activations_are_the_same(plain: ResidentPair, dispatched: ResidentPair) -> None:
    names = sorted(plain.grafts)
    found = [
        ActivationStats.merge(list(stream_stats(p.model, tiny_tokenizer(), EXAMPLES, names, SETTINGS))) for p in (plain, dispatched)
    ]
    assert found[0].keys == found[1].keys
    assert (found[0].values == found[1].values).all()


def test_after_all_that_the_forwards_of_accelerate_are_still_there(dispatched: ResidentPair) -> None:
    before = {name: graft.linear.forward for name, graft in dispatched.grafts.items()}
    answers(dispatched, "exact")
    measure("attribution", Bench(Engine(dispatched, tiny_tokenizer(), SETTINGS, "exact"), lambda: dispatched.model, EXAMPLES, 1))
    assert {name: graft.linear.forward for name, graft in dispatched.grafts.items()} == before
