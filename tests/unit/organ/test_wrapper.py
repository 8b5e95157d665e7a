"""The wrapper is what plain `transformers` makes of the recipient with only the organ's layers in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stacks import Pair, load, logits, make_pair, restacked, save_model, types_of
from transformers import AutoTokenizer

from transplant_ray.errors import CheckpointError, IncompatibleModels
from transplant_ray.models import loading
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.training import trained_parameters
from transplant_ray.organ.wrapper import check_wrapper, load_wrapper


def test_it_is_the_recipient_with_the_organs_layers_alone(pair: Pair) -> None:
    origins = [(pair.source, layer) for layer in (1, 2, 3)]
    reference = restacked(pair, origins, types_of(origins))
    assert torch.equal(logits(load_wrapper(pair.recipient, pair.organ).eval()), logits(reference))


def test_only_the_organ_has_gradients_and_it_has_its_own_names(pair: Pair) -> None:
    model = load_wrapper(pair.recipient, pair.organ)
    ids = torch.randint(3, 40, (2, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == trained_parameters(model).keys() == pair.organ.checkpoint.tensors.keys()


def test_of_the_recipients_layers_nothing_is_read(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = loading.load_tensors

    def spy(checkpoint, names, *rest):  # type: ignore[no-untyped-def]
        names = list(names)
        if checkpoint.model == llama.recipient.model:
            read.extend(names)
        return plain(checkpoint, names, *rest)

    monkeypatch.setattr("transplant_ray.organ.wrapper.load_tensors", spy)
    load_wrapper(llama.recipient, llama.organ)
    assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_a_model_in_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in load_wrapper(pair.recipient, pair.organ).parameters()} == {torch.float32}


def test_a_gpt2_saved_from_its_base_class_works(tmp_path: Path) -> None:
    whole = make_pair(tmp_path / "whole", "gpt2")
    load(whole.recipient.folder).transformer.save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(whole.recipient.folder).save_pretrained(tmp_path / "bare")
    bare = open_checkpoint(str(tmp_path / "bare"))
    ours, theirs = (logits(load_wrapper(recipient, whole.organ).eval()) for recipient in (bare, whole.recipient))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "words"), [({"hidden_size": 64}, "hidden_size"), ({"num_attention_heads": 8}, "num_attention_heads")]
)
def test_an_organ_of_another_shape_is_refused(llama: Pair, tmp_path: Path, changes: dict[str, int], words: str) -> None:
    other = open_checkpoint(str(save_model(tmp_path / "other", **changes)))
    with pytest.raises(IncompatibleModels, match=words):
        check_wrapper(other, llama.organ)


def test_another_vocabulary_is_refused_or_said(llama: Pair, tmp_path: Path) -> None:
    other = open_checkpoint(str(save_model(tmp_path / "other", vocab_size=99)))
    organ = replace(llama.organ, manifest=llama.organ.manifest.model_copy(update={"vocabulary": _another(llama)}))
    with pytest.raises(IncompatibleModels, match="vocabulary"):
        check_wrapper(other, organ)
    assert any("vocabulary" in warning for warning in check_wrapper(other, organ, "warn"))


def _another(pair: Pair) -> object:
    return pair.organ.manifest.vocabulary.model_copy(update={"tokenizer": "0" * 64})


def test_layers_that_compute_by_their_index_are_trained_only_where_they_are(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(IncompatibleModels, match=r"scale_attn_by_inverse_layer_idx.*layer 1 would be layer 0"):
        check_wrapper(pair.recipient, pair.organ)
    first = open_organ(extract_organ(pair.source, "0-1", tmp_path / "first"))
    assert check_wrapper(pair.recipient, first) == ()


def test_a_checkpoint_without_its_norm_is_refused(llama: Pair) -> None:
    tensors = {name: info for name, info in llama.recipient.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, e\.g\. model\.norm\.weight"):
        load_wrapper(replace(llama.recipient, tensors=tensors), llama.organ)
