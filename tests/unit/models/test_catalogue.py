"""The catalogue, held against models that plain transformers has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from header_files import sparse_checkpoint
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, VOCABULARY, save_tiny, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transplant_ray.errors import CheckpointError, RecipeError
from transplant_ray.models import catalogue as catalogue_module
from transplant_ray.models.catalogue import Catalogue, Module, read_catalogue, select_kind
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.families import FAMILIES, guess_role

LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
"""Where the layers are; `model.layers` in all other families."""

_SPLIT = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj", "mlp.gate_proj mlp.up_proj mlp.down_proj")
KINDS = {
    **dict.fromkeys(CONFIGS, _SPLIT),
    "phi3": ("self_attn.qkv_proj self_attn.o_proj", "mlp.gate_up_proj mlp.down_proj"),
    "gpt2": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj"),
    "gpt_neox": ("attention.query_key_value attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "opt": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", "fc1 fc2"),
}
"""Family → paths of attention, paths of feed-forward, written out by hand."""

_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0}
_WIDE = {**_SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
UNLISTED: Mapping[str, tuple[dict[str, Any], str, int]] = {
    "bloom": ({**_SMALL, "hidden_size": 32, "n_layer": 3, "n_head": 4}, "transformer.h", 12),
    "gptj": ({**_SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}, "transformer.h", 18),
    "mpt": ({**_SMALL, "d_model": 32, "n_layers": 3, "n_heads": 4}, "transformer.blocks", 12),
    "falcon": (_WIDE, "transformer.h", 12),
    "starcoder2": ({**_WIDE, "num_key_value_heads": 2}, "model.layers", 18),
}
"""Families that the package does not list: shape, where the layers are, number of modules."""


@dataclass(frozen=True)
class Saved:
    family: str
    folder: Path
    model: PreTrainedModel
    catalogue: Catalogue

    @property
    def layers(self) -> str:
        return LAYERS.get(self.family, "model.layers")


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = save_tiny(tmp_path_factory.mktemp("saved"), request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Saved(request.param, folder, model, read_catalogue(open_checkpoint(str(folder))))


def linear_maps(model: PreTrainedModel, layers: str) -> dict[str, nn.Module]:
    """Every linear map under the list of layers, found by name and class alone."""
    everything = ((name, child) for name, child in model.named_modules() if name.startswith(f"{layers}."))
    return {name: child for name, child in everything if isinstance(child, nn.Linear | Conv1D)}


def test_the_modules_are_the_linear_maps_of_the_loaded_model(saved: Saved) -> None:
    expected = linear_maps(saved.model, saved.layers)
    assert {name: module.shape for name, module in saved.catalogue.modules.items()} == {
        name: tuple(linear.weight.shape) for name, linear in expected.items()
    }
    assert (saved.catalogue.family, saved.catalogue.num_layers, saved.catalogue.excluded) == (saved.family, 3, ())
    assert saved.catalogue.guessed is (saved.family == "opt")


def test_modules_come_in_order_of_layers_and_know_their_place(saved: Saved) -> None:
    modules = saved.catalogue.modules
    assert list(modules) == [f"{saved.layers}.{module.layer}.{module.path}" for module in modules.values()]
    assert [module.name for module in modules.values()] == list(modules)
    assert [module.layer for module in modules.values()] == sorted(module.layer for module in modules.values())


def test_every_module_has_the_kind_that_its_name_says(saved: Saved) -> None:
    attn, ffn = (set(paths.split()) for paths in KINDS[saved.family])
    for layer in range(3):
        here = [module for module in saved.catalogue.modules.values() if module.layer == layer]
        assert {module.path for module in here if module.role.kind == "attn"} == attn
        assert {module.path for module in here if module.role.kind == "ffn"} == ffn


def test_disk_names_hold_the_very_tensors_of_the_loaded_model(saved: Saved) -> None:
    stored = load_file(saved.folder / "model.safetensors")
    for name, module in saved.catalogue.modules.items():
        linear = saved.model.get_submodule(name)
        assert torch.equal(stored[module.disk_weight], linear.weight)
        assert (module.disk_bias is None) == (linear.bias is None)
        assert module.disk_bias is None or torch.equal(stored[module.disk_bias], linear.bias)
        assert module.dtype == "F32"


def test_channels_parameters_and_layout_are_those_of_the_loaded_model(saved: Saved) -> None:
    for name, module in saved.catalogue.modules.items():
        linear = saved.model.get_submodule(name)
        width = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
        assert module.transposed == isinstance(linear, Conv1D)
        assert module.num_channels == linear(torch.zeros(1, linear.weight.numel() // width)).shape[1]
        assert module.num_parameters == sum(parameter.numel() for parameter in linear.parameters())


def test_a_checkpoint_saved_from_the_base_class_differs_in_disk_names_alone(saved: Saved, tmp_path: Path) -> None:
    saved.model.base_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    based = read_catalogue(open_checkpoint(str(tmp_path)))
    assert list(based.modules) == list(saved.catalogue.modules)
    assert based.excluded == ()
    for name, module in based.modules.items():
        assert module.disk_weight != saved.catalogue.modules[name].disk_weight
        assert torch.equal(stored[module.disk_weight], saved.model.get_submodule(name).weight)


def test_every_listed_family_is_held_by_these_tests() -> None:
    assert set(FAMILIES) - {"gemma", "gpt_oss"} == set(CONFIGS) - {"opt"}  # Gemma-1 is read as Llama; both are held below


@pytest.mark.parametrize("kind", UNLISTED)
def test_unlisted_families_are_read_whole_and_said_to_be_guessed(kind: str, tmp_path: Path) -> None:
    shape, layers, count = UNLISTED[kind]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(tmp_path)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path)))
    expected = linear_maps(AutoModelForCausalLM.from_pretrained(tmp_path), layers)
    assert catalogue.guessed
    assert (set(catalogue.modules), len(catalogue.modules), catalogue.num_layers) == (set(expected), count, 3)
    for name, module in catalogue.modules.items():
        assert module.role.kind == ("attn" if "attention" in name or ".attn." in name or "self_attn" in name else "ffn")


def test_gemma_1_is_known(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma", **_WIDE, num_key_value_heads=2, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path)))
    assert (catalogue.guessed, len(catalogue.modules), catalogue.excluded) == (False, 21, ())


def test_gpt_oss_is_known_and_its_experts_are_no_linear_maps(tmp_path: Path) -> None:
    catalogue = read_catalogue(open_checkpoint(str(save_tiny(tmp_path, "gpt_oss"))))
    assert (catalogue.guessed, len(catalogue.modules)) == (False, 12)
    assert {module.path for module in catalogue.modules.values()} == set(_SPLIT[0].split())
    assert {e.name.rpartition("mlp.")[2] for e in catalogue.excluded} == {
        "router.weight", "experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias",
    }  # fmt: skip


def test_biases_travel_with_their_weight(tmp_path: Path) -> None:
    modules = read_catalogue(open_checkpoint(str(save_tiny(tmp_path, "llama", attention_bias=True)))).modules
    biased = {name: module.disk_bias for name, module in modules.items() if module.disk_bias}
    assert biased == {name: f"{name}.bias" for name in modules if "self_attn" in name}


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Catalogue:
    """The catalogue of a tiny Llama whose tensors on disk were changed after it was saved."""
    save_tiny(folder, "llama", attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return read_catalogue(open_checkpoint(str(folder)))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(f"{Q}.weight"), "missing: its weight is not in the checkpoint"),
        (lambda tensors: tensors.pop(f"{Q}.bias"), "missing: its bias is not in the checkpoint"),
        (
            lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(32, 16)}),
            "weight stored as (32, 16), the config says (32, 32)",
        ),
        (lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(16)}), "bias stored as (16,), the config says (32,)"),
        (lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(32, 32, dtype=torch.int8)}), "quantised: weight stored as I8"),
        (
            lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}),
            "quantised: weight stored as F8_E4M3",
        ),
    ],
)
def test_a_module_whose_tensors_do_not_fit_is_left_out_with_its_reason(
    change: Callable[[dict[str, torch.Tensor]], object], reason: str, tmp_path: Path
) -> None:
    catalogue = _rewrite(tmp_path, change)
    assert [(e.name, reason in e.reason) for e in catalogue.excluded] == [(Q, True)], catalogue.excluded
    assert (Q in catalogue.modules, len(catalogue.modules)) == (False, 20)


def test_a_vision_tower_is_never_taken_for_the_decoder(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 28}
    both = Gemma3Config(text_config=tiny_config("gemma3_text").to_dict(), vision_config=vision)
    sparse_checkpoint(tmp_path / "both", both)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path / "both")))
    assert (catalogue.guessed, catalogue.num_layers, len(catalogue.modules)) == (True, 3, 21)
    assert {".".join(name.split(".")[:3]) for name in catalogue.modules} == {"model.language_model.layers"}


def test_a_layer_without_modules_is_a_layer(tmp_path: Path) -> None:
    def lose_the_last_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2." in name]:
            del tensors[name]

    catalogue = _rewrite(tmp_path, lose_the_last_layer)
    assert (len(catalogue.modules), len(catalogue.excluded), catalogue.num_layers) == (14, 7, 3)


@pytest.mark.parametrize("other", ["model.layers.2.mlp.up_proj", "lm_head"])
def test_a_weight_that_is_used_twice_is_left_out(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = "model.layers.0.mlp.up_proj"
    checkpoint = open_checkpoint(str(save_tiny(tmp_path, "llama")))
    model = tiny_model("llama")
    model.get_submodule(other).weight = model.get_submodule(first).weight
    monkeypatch.setattr(catalogue_module, "skeleton", lambda _checkpoint: model)
    catalogue = read_catalogue(checkpoint)
    assert {e.name for e in catalogue.excluded} == {name for name in (first, other) if ".layers." in name}
    assert all(e.reason.startswith("tied: ") for e in catalogue.excluded)


def test_fused_experts_and_routers_are_said_to_be_no_linear_maps(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mixtral", **_WIDE, num_key_value_heads=2, num_local_experts=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path)))
    assert {module.role.kind for module in catalogue.modules.values()} == {"attn"}
    assert {e.name.rpartition("mlp.")[2] for e in catalogue.excluded} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert all(e.reason.startswith("not a linear map: (8, ") for e in catalogue.excluded)


def test_maps_that_are_neither_attention_nor_feed_forward_are_named(tmp_path: Path) -> None:
    shape = {**_WIDE, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 1}
    config = AutoConfig.for_model("jamba", **shape, num_key_value_heads=2, use_mamba_kernels=False, mamba_dt_rank=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    catalogue = read_catalogue(open_checkpoint(str(tmp_path)))
    assert catalogue.num_layers == 4
    assert {module.layer for module in catalogue.modules.values() if module.role.kind == "attn"} == {1}
    reasons = {e.reason for e in catalogue.excluded if e.name.endswith("mamba.in_proj")}
    assert reasons == {"neither attention nor feed-forward by its name"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**{**CONFIGS["llama"][1], "num_hidden_layers": 0}), "no linear maps found under `model.layers`"),
        (LlamaConfig(**{**CONFIGS["llama"][1], "hidden_act": "swoosh"}), "cannot build a causal language model"),
    ],
)
def test_what_has_no_decoder_layers_is_refused(config: Any, words: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words) as raised:
        read_catalogue(open_checkpoint(str(tmp_path)))
    assert str(tmp_path) in str(raised.value)
    assert "decoder" in str(raised.value)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self_attn.q_proj", ("attn", "q")),
        ("attention.wo", ("attn", "wo")),
        ("multi_head_attention.Wq", ("attn", "Wq")),
        ("mlp.gate_up_proj", ("ffn", "gate_up")),
        ("ffn.0", ("ffn", "0")),
        ("feed_forward.down_proj", ("ffn", "down")),
        ("fc2", ("ffn", "fc2")),
        ("mamba.in_proj", None),
        ("temporal_block.linear_x", None),
        ("ffloor", None),
    ],
)
def test_roles_are_guessed_from_whole_words(path: str, role: tuple[str, str] | None) -> None:
    guess = guess_role(path)
    assert (guess and (guess.kind, guess.projection)) == role


# -- select_kind ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, ...]:
    """The modules of a Llama with layers 3 and 13."""
    folder = sparse_checkpoint(tmp_path_factory.mktemp("llama") / "llama", tiny_config("llama", num_hidden_layers=14))
    return tuple(read_catalogue(open_checkpoint(str(folder))).modules.values())


def test_attn_and_ffn_part_all_and_a_projection_is_its_leaf(saved: Saved) -> None:
    modules = tuple(saved.catalogue.modules.values())
    attn, ffn = select_kind(modules, "attn"), select_kind(modules, "ffn")
    assert select_kind(modules, "all") == modules
    assert sorted(m.name for m in (*attn, *ffn)) == sorted(m.name for m in modules)
    for leaf in {module.path.rpartition(".")[2] for module in modules}:
        assert select_kind(modules, leaf) == tuple(m for m in modules if m.name.split(".")[-1] == leaf)


def test_a_path_tells_the_two_c_proj_of_gpt2_apart(tmp_path: Path) -> None:
    modules = read_catalogue(open_checkpoint(str(save_tiny(tmp_path, "gpt2")))).modules.values()
    assert [m.path for m in select_kind(modules, "mlp.c_proj")] == ["mlp.c_proj"] * 3
    assert [m.path for m in select_kind(modules, "c_proj")] == ["attn.c_proj", "mlp.c_proj"] * 3


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("down_prj", "down_proj"),
        ("atn", "attn"),
        ("q_porj", "q_proj"),
        ("fnn", "ffn"),
        ("nonsense", "attn, ffn, all"),
        ("", "attn"),
    ],
)
def test_a_kind_that_matches_nothing_is_refused_with_the_nearest_names(kind: str, near: str, llama: tuple[Module, ...]) -> None:
    with pytest.raises(RecipeError, match=rf"`sweep.kind`: '{kind}' matches no compatible module. Nearest: .*{near}"):
        select_kind(llama, kind)


@pytest.mark.parametrize("kind", ["3.mlp", "1", "mlp", "proj", "_proj", "layers.3.mlp.down_proj", "attn.q_proj", "down", "ALL"])
def test_part_of_a_name_is_never_a_match(kind: str, llama: tuple[Module, ...]) -> None:
    with pytest.raises(RecipeError):
        select_kind(llama, kind)
