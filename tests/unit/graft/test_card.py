"""The card says what was given to what, from which files, how far, and how good it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from transplant_ray.files import sha256_file
from transplant_ray.graft.card import write_card
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.compare import Comparison


@pytest.fixture
def variant(llama: Comparison) -> Variant:
    first, second, third = llama.modules[:3]
    return Variant({first.name: 1.0, second.name: 0.25, third.name: (1.0,) * third.num_channels})


def test_it_names_both_models_and_the_hashes_of_their_files(llama: Comparison, variant: Variant) -> None:
    card = write_card("cross-generation: lae ffn k=8", llama, variant, [])
    assert "# cross-generation: lae ffn k=8\n" in card
    for role, checkpoint in (("Source", llama.source), ("Target", llama.target)):
        assert f"- {role}: `{checkpoint.model}`" in card
        assert f"`model.safetensors` sha256 `{sha256_file(Path(checkpoint.model) / 'model.safetensors')}`" in card


def test_it_lists_every_module_with_its_coefficient(llama: Comparison, variant: Variant) -> None:
    card = write_card("title", llama, variant, [])
    assert f"Variant `{variant.id}`: 3 of 21 compatible modules" in card
    first, second, third = (module.name for module in llama.modules[:3])
    for name, shown in ((first, "1"), (second, "0.25"), (third, "16 channels")):
        assert f"| {name} | {shown} |" in card


def test_it_shows_the_metrics_or_says_that_there_are_none(llama: Comparison, variant: Variant) -> None:
    rows = [{"split": "select", "accuracy": "0.910"}, {"split": "test", "accuracy": "0.875"}]
    card = write_card("title", llama, variant, rows)
    assert "| split | accuracy |\n| --- | --- |\n| select | 0.910 |\n| test | 0.875 |" in card
    assert "Not measured" not in card
    assert "Not measured" in write_card("title", llama, variant, [])


def test_the_front_matter_is_what_hubs_read(llama: Comparison) -> None:
    card = write_card("title", llama, ORIGIN, [])
    _, front, rest = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["transplant-ray"]}
    assert "None: this is the target." in rest
