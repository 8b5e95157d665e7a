"""What does not fit is refused with every field that differs, and a place that an organ cannot have is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stacks import Pair, make_pair, save_model
from tiny import VOCABULARY, tiny_tokenizer

from transplant_ray.errors import IncompatibleModels, OrganError
from transplant_ray.models import loading
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.insertion import Layer, Mode, Placement, plan_insertion


def recipient(folder: Path, family: str = "llama", **changes: object) -> Checkpoint:
    return open_checkpoint(str(save_model(folder / "other", family, 3, **changes)))


def other_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def origins(insertion_layers: tuple[Layer, ...]) -> str:
    """Recipient's layers as numbers, organs' as letters."""
    return "".join(str(layer.index) if layer.organ is None else "abc"[layer.organ] for layer in insertion_layers)


@pytest.mark.parametrize(
    ("mode", "positions", "expected"),
    [
        ("insert", [0], "aaa012345"),
        ("insert", [6], "012345aaa"),
        ("insert", [4, 1], "0aaa123bbb45"),
        ("insert", [1, 2], "0aaa1bbb2345"),
        ("replace", [0], "aaa345"),
        ("replace", [3], "012aaa"),
        ("replace", [3, 0], "aaabbb"),
    ],
)
def test_positions_are_the_recipients_own(llama: Pair, mode: Mode, positions: list[int], expected: str) -> None:
    insertion = plan_insertion(llama.recipient, [Placement(llama.organ, at) for at in positions], mode)
    assert origins(insertion.layers) == expected
    assert [placement.at for placement in insertion.placements] == sorted(positions)


@pytest.mark.parametrize(
    ("mode", "positions", "words"),
    [
        ("insert", [7], r"position 7: the recipient has 6 layers, counted from 0, and the organ 3; to insert it, expected 0 to 6"),
        ("insert", [-1], r"position -1: .*expected 0 to 6"),
        ("replace", [4], r"position 4: .*to replace it, expected 0 to 3"),
        ("insert", [2, 2], r"position 2: another organ is there already. Which of two comes first\?"),
        ("replace", [0, 2], r"position 2: another organ is there already. Choose stretches apart"),
    ],
)
def test_a_place_that_cannot_be_is_refused(llama: Pair, mode: Mode, positions: list[int], words: str) -> None:
    with pytest.raises(OrganError, match=words):
        plan_insertion(llama.recipient, [Placement(llama.organ, at) for at in positions], mode)


def test_an_organ_longer_than_the_recipient_replaces_nothing(llama: Pair, tmp_path: Path) -> None:
    small = recipient(tmp_path, num_hidden_layers=2)
    with pytest.raises(OrganError, match=r"the recipient has 2 layers.*the organ 3; to replace it, it does not fit anywhere"):
        plan_insertion(small, [Placement(llama.organ, 0)], "replace")
    assert origins(plan_insertion(small, [Placement(llama.organ, 1)]).layers) == "0aaa1"


@pytest.mark.parametrize(
    ("family", "changes", "fields"),
    [
        ("llama", {"hidden_size": 64, "head_dim": 8}, ["hidden_size"]),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, ["head_dim", "num_attention_heads", "num_key_value_heads"]),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ["rope_parameters.rope_theta"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, "max_position_embeddings": 256},
            ["max_position_embeddings", "rope_parameters.factor", "rope_parameters.rope_type"],
        ),
        ("mistral", {"sliding_window": None}, ["model_type"]),
        ("gpt2", {}, ["model_type", "rope_parameters", "rms_norm_eps", "activation_function"]),
        (
            "llama",
            {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 60, "rms_norm_eps": 1e-5},
            ["hidden_size", "intermediate_size", "rms_norm_eps", "head_dim"],
        ),
    ],
)  # fmt: skip
def test_every_field_that_differs_is_named_at_once(
    llama: Pair, tmp_path: Path, family: str, changes: dict[str, object], fields: list[str]
) -> None:
    with pytest.raises(IncompatibleModels, match="Choose a recipient of the family, shape and positions") as raised:
        plan_insertion(recipient(tmp_path, family, **changes), [Placement(llama.organ, 1)])
    said = str(raised.value)
    assert all(f"\n  `{field}`" in said for field in fields), said
    assert said.startswith(f"organ {llama.organ.manifest.id} of {llama.source.model} does not fit {tmp_path}/other:\n")
    if family == "llama":
        assert said.count("\n  `") == len(fields), said


def test_nothing_of_the_weights_is_read(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "safe_open", refuse)
    assert len(plan_insertion(llama.recipient, [Placement(llama.organ, 1)]).layers) == 9


# -- vocabularies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Checkpoint:
    folder = save_model(tmp_path / "other", seed=3)
    other_tokenizer(folder)
    return open_checkpoint(str(folder))


def test_another_vocabulary_is_refused(llama: Pair, foreign: Checkpoint) -> None:
    with pytest.raises(IncompatibleModels, match=r"the vocabulary: tokens or their ids are others.*--vocabulary warn"):
        plan_insertion(foreign, [Placement(llama.organ, 1)])


def test_or_put_in_with_a_warning(llama: Pair, foreign: Checkpoint) -> None:
    insertion = plan_insertion(foreign, [Placement(llama.organ, 1)], vocabulary="warn")
    assert len(insertion.warnings) == 1
    assert insertion.warnings[0].endswith(f"the organ has only seen the embedding of {llama.source.model}")


def test_a_padded_embedding_is_no_other_vocabulary(llama: Pair, tmp_path: Path) -> None:
    assert plan_insertion(recipient(tmp_path, vocab_size=VOCABULARY + 18), [Placement(llama.organ, 1)]).warnings == ()


@pytest.mark.parametrize("size", [VOCABULARY, VOCABULARY + 1])
def test_without_a_tokenizer_sizes_are_compared_and_that_is_said(llama: Pair, tmp_path: Path, size: int) -> None:
    folder = save_model(tmp_path / "other", seed=3, vocab_size=size)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    if size == VOCABULARY:
        insertion = plan_insertion(open_checkpoint(str(folder)), [Placement(llama.organ, 1)])
        assert insertion.warnings == (
            "the vocabulary could be compared by its size alone, for one of the two came without a tokenizer",
        )
    else:
        with pytest.raises(IncompatibleModels, match=f"the organ has seen {VOCABULARY} tokens, the recipient has {size}"):
            plan_insertion(open_checkpoint(str(folder)), [Placement(llama.organ, 1)])


# -- layers that know their index -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """GPT-2 as Mistral's researchers train it: attention is scaled by the layer's index."""
    return make_pair(tmp_path_factory.mktemp("counted"), "gpt2", scale_attn_by_inverse_layer_idx=True)


def test_layers_that_know_their_index_keep_it(counted: Pair) -> None:
    plan_insertion(counted.recipient, [Placement(counted.organ, 1)], "replace")
    for mode, at, moved in (("replace", 2, "layer 1 would become 2"), ("insert", 1, "layer 1 would become 4")):
        with pytest.raises(IncompatibleModels, match=f"with `scale_attn_by_inverse_layer_idx` a layer computes.*{moved}"):
            plan_insertion(counted.recipient, [Placement(counted.organ, at)], mode)  # type: ignore[arg-type]


def test_the_same_organ_may_come_from_two_folders(llama: Pair, tmp_path: Path) -> None:
    again: Organ = open_organ(extract_organ(llama.source, "1-3", tmp_path / "again"))
    insertion = plan_insertion(llama.recipient, [Placement(again, 3), Placement(llama.organ, 0)])
    assert origins(insertion.layers) == "aaa012bbb345"
