"""Small models from nothing: tokenizer, first weights, training, and what counting alone reaches."""

from __future__ import annotations

import itertools
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from demos import small_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from transplant_ray.errors import RunError
from transplant_ray.files import sha256_file
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.scratch import END, SMALL_FAMILIES, train_tokenizer
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.ngrams import Counts
from transplant_ray.organ.pack import Blocks
from transplant_ray.pipeline import demo_models
from transplant_ray.pipeline.demo_models import SmallModel, make_model
from transplant_ray.pipeline.demo_text import DemoText
from transplant_ray.pipeline.watch import Silent
from transplant_ray.recipe import DemoFamily, DemoSpec

SIZES = {
    "characters": 150_000, "problems": 100, "vocabulary": 300, "layers": 2, "width": 16, "heads": 2, "context": 16, "batch": 2,
    "tokens": 96, "contexts": 4,
}  # fmt: skip


def spec(family: DemoFamily = "gpt2", **changes: int) -> DemoSpec:
    return DemoSpec.model_validate({"family": family, **SIZES, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DemoText:
    return small_text(spec(), tmp_path_factory.mktemp("demo") / "text", None)


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def model(request: pytest.FixtureRequest, text: DemoText, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_model(spec(request.param), text, tmp_path_factory.mktemp(request.param) / "model", 1)


def test_every_text_comes_back_from_the_tokenizer_also_as_auto_tokenizer_loads_it(model: SmallModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    for said in ("def f(x):\n    return x**2\n", "  two spaces, Tab\t, “quotes”, Ω, 漢字 and 🙂.", "", "3,141 + 59 = ?"):
        ids = tokenizer(said)["input_ids"]
        assert tokenizer.decode(ids) == said
        assert all(i < len(tokenizer) for i in ids)
    assert tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id == 0


def test_a_tokenizer_is_the_same_for_the_same_text() -> None:
    texts = [f"{word} {other}" for word in ("apples", "pears") for other in ("are", "were", "have been")]
    first, second = (train_tokenizer(texts, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_the_model_is_a_checkpoint_that_organs_can_be_cut_out_of(model: SmallModel, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model.folder)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == model.record["parameters"]
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(model.folder))
    organ = open_organ(extract_organ(open_checkpoint(str(model.folder)), "1", tmp_path / "organ"))
    assert organ.manifest.vocabulary.tokenizer is not None


def test_three_steps_give_the_same_bytes_twice_and_other_seeds_others(model: SmallModel, text: DemoText, tmp_path: Path) -> None:
    family = model.record["asked"]["family"]
    again = make_model(spec(family), text, tmp_path / "again", 1)
    other = make_model(spec(family, seed=1), text, tmp_path / "other", 1)
    assert model.record["steps"] == again.record["steps"] == 3
    hashes = [sha256_file(each.folder / "model.safetensors") for each in (model, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert again.record["perplexity"] == model.record["perplexity"]
    assert not list(tmp_path.glob(".*"))


def test_stopped_it_goes_on_and_ends_with_the_same_weights(model: SmallModel, text: DemoText, tmp_path: Path) -> None:
    family = model.record["asked"]["family"]

    class AfterTwo(Silent):
        steps = 0

        def advance(self, amount: int) -> None:
            self.steps += amount
            if self.steps > 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(spec(family), text, tmp_path / "model", 1, AfterTwo())
    assert not (tmp_path / "model").exists()
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    resumed = make_model(spec(family), text, tmp_path / "model", 1, Noting())
    assert any(note.startswith("goes on after step 2 of 3") for note in notes)
    assert sha256_file(resumed.folder / "model.safetensors") == sha256_file(model.folder / "model.safetensors")


def test_a_model_that_is_there_is_taken_and_another_is_refused(
    model: SmallModel, text: DemoText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "first_weights", None)  # nothing is trained
    family = model.record["asked"]["family"]
    assert make_model(spec(family, organ_tokens=7), text, model.folder, 1) == model
    with pytest.raises(RunError, match="other settings or text"):
        make_model(spec(family, tokens=960), text, model.folder, 1)


def test_counts_are_what_a_slow_loop_finds(tmp_path: Path) -> None:
    draw, vocabulary, context = np.random.default_rng(0), 7, 5
    (tmp_path / "train.bin").write_bytes(draw.integers(0, vocabulary - 1, 60).astype("uint16").tobytes())  # one token is never seen
    (tmp_path / "test.bin").write_bytes(draw.integers(0, vocabulary, 20).astype("uint16").tobytes())
    train, test = Blocks(tmp_path / "train.bin", 12, context, "uint16"), Blocks(tmp_path / "test.bin", 4, context, "uint16")
    single = Counter(int(token) for row in train.read(range(12)) for token in row)
    pairs = Counter((int(a), int(b)) for row in train.read(range(12)) for a, b in itertools.pairwise(row))
    share = {token: (single[token] + 1) / (60 + vocabulary) for token in range(vocabulary)}

    def after(a: int, b: int) -> float:
        seen, kinds = sum(pairs[a, c] for c in range(vocabulary)), len([c for c in range(vocabulary) if pairs[a, c]])
        return (pairs[a, b] + kinds * share[b]) / (seen + kinds) if seen else share[b]

    steps = [(int(a), int(b)) for row in test.read(range(4)) for a, b in itertools.pairwise(row)]
    counts = Counts.of(train, vocabulary)
    assert counts.unigram_loss(test) == pytest.approx(-sum(log(share[b]) for _, b in steps) / len(steps))
    assert counts.bigram_loss(test) == pytest.approx(-sum(log(after(a, b)) for a, b in steps) / len(steps))
    chances = [sum(after(a, b) for b in range(vocabulary)) for a in range(vocabulary)]
    assert torch.allclose(torch.tensor(chances), torch.ones(vocabulary))
