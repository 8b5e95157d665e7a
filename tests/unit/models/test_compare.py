"""Comparison of two checkpoints: pairs, reasons of exclusion, and warnings where equal shapes mean different things."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from header_files import sparse_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import CONFIGS, DEEP_FAMILIES, VOCABULARY, save_tiny, tiny_config, tiny_model, tiny_pair
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig

from transplant_ray.errors import IncompatibleModels
from transplant_ray.models import compare as compare_module
from transplant_ray.models.checkpoint import CONFIG_ERRORS, Checkpoint, open_checkpoint
from transplant_ray.models.compare import MEANING, check_segmentation, check_vocabulary, compare

Headers = Callable[[PretrainedConfig], Checkpoint]

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGER = {**LONG, "long_factor": [3.0] * 4}
LONG_PHI = {"rope_parameters": LONG, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    """Makes a checkpoint that is no more than config and headers, once for each config."""
    made: dict[str, Checkpoint] = {}

    def make(config: PretrainedConfig) -> Checkpoint:
        key = config.to_json_string()
        if key not in made:
            made[key] = open_checkpoint(
                str(sparse_checkpoint(tmp_path_factory.mktemp("sparse") / config.model_type, config, "F32"))
            )
        return made[key]

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_two_models_of_one_config_fit_whole_and_without_a_word(family: str, headers: Headers) -> None:
    comparison = compare(headers(tiny_config(family)), headers(tiny_config(family)))
    model = tiny_model(family)
    layers = [name for name, _ in model.named_modules() if name.endswith((".0", ".1", ".2")) and name.count(".") <= 3]
    assert len(layers) == comparison.num_layers == 3
    assert [pair.name for pair in comparison.pairs.values()] == list(comparison.pairs) == [m.name for m in comparison.modules]
    assert comparison.excluded == ()
    assert [warning for warning in comparison.warnings if "guessed" not in warning] == []
    assert bool(comparison.warnings) == (family == "opt")


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_a_pair_holds_the_names_on_disk_of_either_side(family: str, tmp_path: Path) -> None:
    tiny_model(family).base_model.save_pretrained(tmp_path / "source")
    save_tiny(tmp_path / "target", family)
    source, target = (open_checkpoint(str(tmp_path / role)) for role in ("source", "target"))
    comparison = compare(source, target)
    assert comparison.excluded == ()
    for pair in comparison.pairs.values():
        assert pair.source.name == pair.target.name
        assert pair.source.disk_weight in source.tensors
        assert pair.target.disk_weight in target.tensors
        assert pair.source.disk_weight != pair.target.disk_weight


def test_another_intermediate_size_leaves_out_the_feed_forward_with_both_shapes(headers: Headers) -> None:
    comparison = compare(headers(tiny_config("llama", intermediate_size=64)), headers(tiny_config("llama")))
    assert {pair.target.role.kind for pair in comparison.pairs.values()} == {"attn"}
    reasons = {e.name: e.reason for e in comparison.excluded}
    assert len(reasons) == 9
    assert reasons["model.layers.0.mlp.up_proj"] == "shape: source is (64, 32), target is (48, 32)"
    assert reasons["model.layers.2.mlp.down_proj"] == "shape: source is (32, 64), target is (32, 48)"


@pytest.mark.parametrize(("source", "target", "side"), [(4, 3, "target"), (3, 4, "source")])
def test_layers_that_one_side_lacks_are_reported_missing(source: int, target: int, side: str, headers: Headers) -> None:
    comparison = compare(*(headers(tiny_config("llama", num_hidden_layers=n)) for n in (source, target)))
    assert len(comparison.pairs) == 21
    assert {e.name.split(".")[2] for e in comparison.excluded} == {"3"}
    assert {e.reason for e in comparison.excluded} == {f"missing: the {side} has no such module"}
    assert f"number of layers: `num_hidden_layers` is {source} in the source and {target} in the target" in comparison.warnings


@pytest.mark.parametrize("biased", ["source", "target"])
def test_a_bias_on_one_side_alone_leaves_the_module_out(biased: str, headers: Headers) -> None:
    comparison = compare(*(headers(tiny_config("llama", attention_bias=role == biased)) for role in ("source", "target")))
    assert {pair.target.role.kind for pair in comparison.pairs.values()} == {"ffn"}
    assert {e.reason for e in comparison.excluded} == {"bias: only one of the two has one"}


def test_what_a_side_itself_left_out_keeps_that_sides_reason(headers: Headers) -> None:
    config = MixtralConfig(**{**CONFIGS["llama"][1], "num_local_experts": 8, "pad_token_id": 0})
    comparison = compare(headers(config), headers(config))
    reasons = {e.name: e.reason for e in comparison.excluded}
    assert reasons["model.layers.0.mlp.experts.down_proj"].startswith("target: not a linear map: (8, ")


def test_what_the_source_left_out_is_said_of_the_source(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    for role in ("source", "target"):
        sparse_checkpoint(tmp_path / role, tiny_config("llama"), "F32")
    tensors = tiny_model("llama").state_dict()
    save_file({n: t for n, t in tensors.items() if n != f"{name}.weight"}, tmp_path / "source" / "model.safetensors")
    comparison = compare(*(open_checkpoint(str(tmp_path / role)) for role in ("source", "target")))
    reasons = {e.name: e.reason for e in comparison.excluded}
    assert reasons == {name: "source: missing: its weight is not in the checkpoint under any known name"}


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt_neox", "llama"), ("opt", "phi3")])
def test_models_without_a_common_module_are_refused_by_name_with_examples(source: str, target: str, headers: Headers) -> None:
    with pytest.raises(IncompatibleModels) as raised:
        compare(headers(tiny_config(source)), headers(tiny_config(target)))
    words = str(raised.value)
    assert re.search(rf"source \S+/{source} \({source}\) and target \S+/{target} \({target}\)", words)
    assert ": missing: the source has no such module" in words
    assert "Choose two models of one family and size." in words


def test_models_of_one_family_and_other_widths_are_refused_with_the_shapes(headers: Headers) -> None:
    with pytest.raises(IncompatibleModels, match=r"q_proj: shape: source is \(64, 64\), target is \(32, 32\)"):
        compare(headers(tiny_config("llama", hidden_size=64)), headers(tiny_config("llama")))


VARIED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("positions: `rope_parameters.rope_theta`", "llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("positions: `rope_parameters.long_factor`", "phi3", LONG_PHI, {**LONG_PHI, "rope_parameters": LONGER}),
    ("positions: `rope_parameters.rope_type`", "phi3", {}, LONG_PHI),
    ("positions: `rope_parameters.sliding_attention.rope_theta`", "gemma3_text", {}, {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }}),
    ("positions: `rope_parameters.partial_rotary_factor`", "gpt_neox", {}, {"rotary_pct": 0.5}),
    ("positions: `max_position_embeddings`", "phi3", LONG_PHI, {**LONG_PHI, "max_position_embeddings": 256}),
    ("norm: `rms_norm_eps`", "llama", {}, {"rms_norm_eps": 1e-3}),
    ("norm: `layer_norm_epsilon`", "gpt2", {}, {"layer_norm_epsilon": 1e-3}),
    ("norm: `layer_norm_eps`", "gpt_neox", {}, {"layer_norm_eps": 1e-3}),
    ("activation function: `hidden_act`", "llama", {}, {"hidden_act": "relu"}),
    ("activation function: `hidden_activation`", "gemma2", {}, {"hidden_activation": "relu"}),
    ("activation function: `activation_function`", "gpt2", {}, {"activation_function": "relu"}),
    ("attention scaling or soft-caps: `query_pre_attn_scalar`", "gemma2", {}, {"query_pre_attn_scalar": 16}),
    ("attention scaling or soft-caps: `attn_logit_softcapping`", "gemma2", {}, {"attn_logit_softcapping": None}),
    ("attention scaling or soft-caps: `final_logit_softcapping`", "gemma2", {}, {"final_logit_softcapping": 10.0}),
    ("attention scaling or soft-caps: `scale_attn_weights`", "gpt2", {}, {"scale_attn_weights": False}),
    ("attention scaling or soft-caps: `scale_attn_by_inverse_layer_idx`", "gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}),
    ("attention window: `sliding_window`", "mistral", {}, {"sliding_window": 8}),
    ("attention window: `layer_types`", "gemma2", {}, {"layer_types": ["full_attention"] * 3}),
    ("residual path: `use_parallel_residual`", "gpt_neox", {}, {"use_parallel_residual": False}),
    ("heads: `num_attention_heads`", "gpt2", {}, {"n_head": 8}),
    ("heads: `num_attention_heads`", "phi3", {}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("heads: `num_key_value_heads`", "phi3", {}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("heads: `head_dim`", "llama", {}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ("vocabulary size: `vocab_size`", "llama", {}, {"vocab_size": VOCABULARY + 2}),
    ("end tokens: `eos_token_id`", "llama", {}, {"eos_token_id": [2, 3]}),
    ("number of layers: `num_hidden_layers`", "gpt2", {}, {"n_layer": 2}),
]  # fmt: skip
"""The start of a warning, a family, and what source and target change in its config."""


@pytest.mark.parametrize(("warning", "family", "source", "target"), VARIED)
def test_equal_shapes_of_other_meaning_are_warned_about(
    warning: str, family: str, source: dict[str, Any], target: dict[str, Any], headers: Headers
) -> None:
    comparison = compare(headers(tiny_config(family, **source)), headers(tiny_config(family, **target)))
    assert [w for w in comparison.warnings if w.startswith(f"{warning} is ") and " in the source and " in w], comparison.warnings
    assert len({w.split(" is ", 1)[1] for w in comparison.warnings}) == len(comparison.warnings), "one finding, said twice"


def test_every_meaning_is_varied_above() -> None:
    elsewhere = {"architecture", "width"}  # another family is below; with another width nothing fits, but in hand-made models
    assert {warning.partition(":")[0] for warning, *_ in VARIED} == set(MEANING) - elsewhere


def test_another_family_of_the_same_names_and_shapes_is_warned_about(headers: Headers) -> None:
    comparison = compare(headers(tiny_config("gemma2")), headers(tiny_config("llama")))
    assert (len(comparison.pairs), comparison.excluded) == (21, ())
    assert "architecture: `model_type` is 'gemma2' in the source and 'llama' in the target" in comparison.warnings


def test_an_unknown_family_is_said_to_be_guessed(headers: Headers) -> None:
    assert compare(headers(tiny_config("opt")), headers(tiny_config("opt"))).warnings == (
        "opt: an unknown family; layers and roles are guessed from names",
    )


def changed(value: Any) -> list[Any]:
    """Other values that a config entry of this kind may have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value // 2 if isinstance(value, int) else value / 2]
    if isinstance(value, dict) and "rope_theta" in value:
        return [{**value, "rope_theta": 500.0}]
    return {"silu": ["relu"], "gelu": ["relu"], "gelu_new": ["relu"], "gelu_pytorch_tanh": ["relu"]}.get(str(value), [])


def logits(config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What these weights compute under a config; None where the config wants others, or makes no model."""
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(weights)
        return model(torch.arange(3, VOCABULARY)[None]).logits
    except CONFIG_ERRORS:
        return None


HARMLESS = re.compile(r"tie_word_embeddings|.*_id|.*drop.*|output_.*|use_cache|return_dict|initializer_range|is_.*|summary_.*")
"""What changes outputs outside of all modules, or in training, or nothing (left out to save time)."""


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_no_config_entry_that_changes_what_equal_weights_compute_goes_unsaid(family: str) -> None:
    model = tiny_model(family)
    config, weights = model.config, model.state_dict()
    expected = logits(config, weights)
    assert expected is not None
    silent, varied = [], 0
    for key, other in ((key, other) for key, value in config.to_dict().items() for other in changed(value)):
        if HARMLESS.fullmatch(key):
            continue
        try:
            twin = type(config).from_dict({**config.to_dict(), key: other})
        except CONFIG_ERRORS:
            continue
        found = logits(twin, weights)
        if found is not None and (found - expected).abs().max() > 1e-5:
            varied += 1
            silent += [] if compare_module._differences(twin, config) else [(key, other)]
    assert silent == []
    assert varied > 2


# -- tokenizers --------------------------------------------------------------------------------------------------------------

vocabularies = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5), min_size=1)


@given(vocabularies, vocabularies)
@settings(max_examples=30, deadline=None)
def test_vocabularies_are_refused_exactly_where_they_differ(source: dict[str, int], target: dict[str, int]) -> None:
    check_vocabulary(source, target, ["vocabulary"])
    check_vocabulary(source, dict(source), [])
    if source != target:
        differing = sum(source.get(token) != target.get(token) for token in "abcdef")
        with pytest.raises(IncompatibleModels, match=rf"{differing} tokens differ, e.g. '\w' is .*accept: \[vocabulary\]"):
            check_vocabulary(source, target, ["segmentation"])


def test_an_added_token_is_named_with_both_ids() -> None:
    with pytest.raises(IncompatibleModels, match=r"1 tokens differ, e.g. '<new>' is None in the source and 7 in the target"):
        check_vocabulary({"a": 1}, {"a": 1, "<new>": 7}, [])


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_equal_segmentation_is_accepted_and_another_refused_with_the_prompt() -> None:
    check_segmentation(["ab cd", ""], characters, lambda text: tuple(characters(text)), [])
    with pytest.raises(
        IncompatibleModels, match=r"the prompt 'ab cd' is 2 tokens in the source and 5 in the target.*accept: \[seg"
    ):
        check_segmentation(["", "ab cd"], words, characters, [])


def test_other_tokens_in_the_same_number_are_refused() -> None:
    with pytest.raises(IncompatibleModels, match="2 tokens in the source and 2 in the target"):
        check_segmentation(["ab"], characters, lambda text: characters(text.upper()), ["remote_code"])


@pytest.mark.parametrize("accept", ["segmentation", "vocabulary"])
def test_another_segmentation_passes_where_the_recipe_accepts_it(accept: str) -> None:
    check_segmentation(["ab cd"], words, characters, [accept])


def test_the_tiny_pair_of_every_test_fits_whole(tmp_path: Path) -> None:
    comparison = tiny_pair(tmp_path)
    assert (len(comparison.pairs), comparison.excluded, comparison.warnings) == (21, (), ())
