"""What the config of a new model says of its layers: counts, types, patterns that were left to the index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stacks import Pair, contents, load, make_pair
from tiny import tiny_config
from transformers import AutoConfig

from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Placement, plan_insertion
from transplant_ray.organ.settings import differing_settings, layer_settings, layer_types, with_layers

F, S = "full_attention", "sliding_attention"


def write(pair: Pair, at: int, out: Path, mode: str = "insert") -> dict[str, object]:
    write_insertion(plan_insertion(open_checkpoint(str(pair.recipient.folder)), [Placement(pair.organ, at)], mode), out)
    said: dict[str, object] = json.loads((out / "config.json").read_text())
    return said


def edit_config(folder: Path | None, **changes: object) -> None:
    """None takes a key out."""
    path = Path(str(folder)) / "config.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma2", [S, F, F, S, F, S, F, S, F]),
        ("gpt_oss", [S, F, F, S, F, S, F, S, F]),
        ("gemma3_text", [S, S, S, F, S, F, S, S, F]),
        ("qwen2", [F, F, F, F, S, F, S, S, S]),
    ],
)
def test_a_pattern_that_was_left_to_the_index_is_written_out(tmp_path: Path, family: str, expected: list[str]) -> None:
    pair = make_pair(tmp_path, family)
    edit_config(pair.recipient.folder, layer_types=None)
    assert write(pair, 2, tmp_path / "out")["layer_types"] == expected
    assert load(tmp_path / "out").config.layer_types == expected


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_what_stays_as_it_was_is_not_written(tmp_path: Path, family: str) -> None:
    pair = make_pair(tmp_path, family)
    edit_config(pair.recipient.folder, layer_types=None)
    write(pair, 1, tmp_path / "out", "replace")
    assert contents(tmp_path / "out")["config.json"] == contents(pair.recipient.folder)["config.json"]


@pytest.mark.parametrize(
    ("types", "start"), [([F, F, S], 2), ([F, S, S, S], 1), ([S, S], 0), ([F, F], None), ([F, S, F], None), ([F, F, F, S, S], None)]
)
def test_the_start_of_the_window_goes_along_where_there_is_one(types: list[str], start: int | None) -> None:
    """Of other patterns it says nothing; `layer_types` decides."""
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=3, num_hidden_layers=6)
    settings = layer_settings(config, types)
    expected = {"num_hidden_layers": len(types), "layer_types": types}
    if types == [F, F]:
        start = 2  # none slides
    assert settings == expected | ({} if start is None else {"max_window_layers": start})
    assert layer_types(with_layers(config, types)) == tuple(types)


def test_without_a_window_its_start_stays() -> None:
    assert layer_settings(tiny_config("qwen2"), [F] * 4) == {"num_hidden_layers": 4, "layer_types": [F] * 4}


def test_other_keys_of_the_config_stay_as_they_are(llama: Pair, tmp_path: Path) -> None:
    before = json.loads((Path(str(llama.recipient.folder)) / "config.json").read_text())
    assert write(llama, 0, tmp_path / "out") == {**before, "num_hidden_layers": 9}
    assert list(before) == list(json.loads((tmp_path / "out" / "config.json").read_text()))


def test_gpt2_may_say_its_count_under_either_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt2")
    edit_config(pair.recipient.folder, num_hidden_layers=6)
    said = write(pair, 1, tmp_path / "out")
    assert (said["n_layer"], said["num_hidden_layers"]) == (9, 9)
    edit_config(pair.recipient.folder, n_layer=None)
    write(pair, 1, tmp_path / "other")
    assert AutoConfig.from_pretrained(tmp_path / "other").num_hidden_layers == 9


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_size": 64}, "`hidden_size` is 32 in the organ and 64 in the recipient"),
        ("llama", {"num_key_value_heads": 4}, "`num_key_value_heads` is 2 in the organ and 4"),
        ("llama", {"intermediate_size": 64}, "`intermediate_size` is 48"),
        ("llama", {"rms_norm_eps": 1e-5}, "`rms_norm_eps` is 1e-06 in the organ and 1e-05"),
        ("llama", {"hidden_act": "gelu"}, "`hidden_act` is 'silu' in the organ and 'gelu'"),
        ("llama", {"attention_bias": True}, "`attention_bias` is False"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "`rope_parameters.rope_theta` is 10000.0"),
        ("mistral", {"sliding_window": None}, "`sliding_window` is 16 in the organ and not set"),
        ("gemma2", {"attn_logit_softcapping": None}, "`attn_logit_softcapping` is 50.0 in the organ and not set"),
        ("gpt2", {"n_head": 2}, "`num_attention_heads` is 4 in the organ and 2"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` is False"),
        ("gpt_oss", {"num_experts_per_tok": 1}, "`num_experts_per_tok` is 2"),
    ],
)
def test_what_changes_the_meaning_of_a_layer_differs(family: str, changes: dict[str, object], words: str) -> None:
    differing = differing_settings(tiny_config(family), tiny_config(family, **changes))
    assert any(line.startswith(words) for line in differing), differing


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"vocab_size": 99, "eos_token_id": 5, "tie_word_embeddings": True, "num_hidden_layers": 9, "use_cache": False}),
        ("llama", {"max_position_embeddings": 4096, "attention_dropout": 0.1}),
        ("gpt2", {"n_positions": 64, "resid_pdrop": 0.0}),
        ("gemma2", {"num_hidden_layers": 5, "final_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window_pattern": 2}),
    ],
)
def test_what_touches_no_layer_does_not(family: str, changes: dict[str, object]) -> None:
    assert differing_settings(tiny_config(family), tiny_config(family, **changes)) == []


def test_how_far_positions_reach_counts_where_they_are_scaled_by_it() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    long = tiny_config("llama", max_position_embeddings=256, rope_parameters=rope)
    assert differing_settings(tiny_config("llama", rope_parameters=rope), long) == [
        "`max_position_embeddings` is 128 in the organ and 256 in the recipient"
    ]


def test_a_setting_that_nobody_has_listed_counts() -> None:
    """As one would that a later version of transformers adds."""
    config = tiny_config("llama")
    config.attention_twist = 3
    assert differing_settings(config, tiny_config("llama")) == ["`attention_twist` is 3 in the organ and not set in the recipient"]
