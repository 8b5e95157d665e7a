"""The recipe: what is misspelt, out of range or without effect is refused by its place; whatever is read can be written again."""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import HubData, Recipe, load_recipe, parse_recipe

GUARD: dict[str, Any] = {
    "data": "/data/reversal.jsonl",
    "prompt": "{prompt}",
    "answer": "{answer}",
    "scorer": "exact",
    "choices": None,
    "max_new_tokens": 8,
    "stop": [],
    "chat_template": False,
    "system": None,
    "shots": None,
    "lm_eval": None,
    "num_fewshot": None,
    "metric": None,
    "filter": None,
    "split": {"probe": 64, "select": 150, "test": 150, "seed": 42},
    "margin": 0.1,
}
WHOLE: dict[str, Any] = {
    "name": "cross-generation",
    "source": {"model": "org/new", "revision": None},
    "target": {"model": "org/old", "revision": "main"},
    "base": {"model": "org/base", "revision": "v1"},
    "task": {
        "data": "/data/arithmetic.jsonl",
        "prompt": "{prompt}",
        "answer": "{answer}",
        "scorer": "exact",
        "choices": None,
        "max_new_tokens": 8,
        "stop": ["\n"],
        "chat_template": True,
        "system": "be short",
        "shots": {"num": 5, "separator": "\n\n", "data": "/data/shots.jsonl"},
        "lm_eval": None,
        "num_fewshot": None,
        "metric": None,
        "filter": None,
        "split": {"probe": 128, "select": 300, "test": 300, "seed": 42},
    },
    "rank": {"by": ["lae", "depth"], "trajectory": "source", "max_new_tokens": 4, "steps": 4},
    "guards": {
        "tasks": {
            "reversal": GUARD,
            "spared": {**copy.deepcopy(GUARD), "data": "/data/spared.jsonl"},
        },
        "held_out": None,
        "text": {
            "data": "/data/text.jsonl",
            "text": "{text}",
            "tokens": 64,
            "split": {"probe": 10, "select": 20, "test": 30, "seed": 1},
        },
    },
    "sweep": {
        "k": [1, 2, 24],
        "kind": ["attn", "ffn", "all"],
        "extrapolate": False,
        "loss": True,
        "alpha": [0.5, 1.0],
        "channels": [],
        "objective": {"price": 0.5, "veto": True},
        "screen": {"keep": 0.25, "by": "loss"},
        "race": {"rungs": [50, 100], "keep": 0.4},
        "primary": None,
        "arms": 20,
        "controls": {"random": 4, "alpha": [0.25, 0.5], "merges": ["task_arithmetic", "ties"], "scales": [0.5], "density": 0.2},
    },
    "search": {
        "gates": {"penalty": [0.0, 0.5], "kind": "ffn", "unit": "module", "steps": 20, "learning_rate": 0.01},
        "greedy": {"penalty": [1.0], "kind": "attn", "k": 5},
    },
    "resources": {
        "address": None,
        "gpus_per_model": 0.5,
        "cpus_per_model": 2,
        "evaluators": 2,
        "labels": {"source": {"role": "source"}, "evaluator": {"room": "cold"}},
        "accelerator_type": "H100",
        "wait": 30.0,
        "dtype": "bfloat16",
        "batch_size": 8,
        "shard_size": 50,
    },
    "tracking": {"uri": "sqlite:///mlflow.db", "experiment": "transplant", "upload": "delta", "patience": 60.0},
    "storage": "runs",
    "ledger": True,
    "accept": ["segmentation"],
}
LEAST = {
    "name": "least",
    "source": {"model": "org/new"},
    "target": {"model": "org/old"},
    "task": {"data": "/d.jsonl", "prompt": "{prompt}", "answer": "{answer}", "max_new_tokens": 8},
    "sweep": {"k": [1]},
}


def write(path: Path, recipe: Any) -> Path:
    path.write_text(yaml.dump(recipe, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe.yaml", WHOLE)


def changed(mapping: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(mapping)
    *parts, last = place.split(".")
    inner = made
    for part in parts:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return made


def test_every_field_is_read_as_it_is_written(whole: Path) -> None:
    assert load_recipe(whole).model_dump(mode="json") == WHOLE


def test_defaults_are_those_of_the_method(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "least.yaml", LEAST))
    assert recipe.task.split.model_dump() == {"probe": 128, "select": 300, "test": 300, "seed": 42}
    assert (recipe.rank.by, recipe.rank.trajectory, recipe.rank.max_new_tokens) == (("lae",), "own", None)
    assert (recipe.sweep.kind, recipe.sweep.alpha) == (("all",), (1.0,))
    assert (recipe.sweep.controls.random, recipe.sweep.controls.alpha) == (3, (0.25, 0.5, 0.75))
    assert (recipe.resources.dtype, recipe.resources.gpus_per_model) == ("float32", 0)
    assert recipe.tracking.upload == "checkpoint"
    assert recipe.accept == ()
    assert recipe.search is None


def test_a_recipe_cannot_be_changed(whole: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(whole).name = "other"  # type: ignore[misc]


# Keys and values.


@pytest.mark.parametrize(
    ("place", "near"),
    [
        ("nam", "`name`"),
        ("sweeep", "`sweep`"),
        ("task.max_new_token", "`task.max_new_tokens`"),
        ("task.split.selct", "`task.split.select`"),
        ("sweep.controls.rnd", "`sweep.controls.random`"),
        ("rank.trajectry", "`rank.trajectory`"),
        ("max_new_tokens", r"`task.max_new_tokens`"),
        ("resources.gpus_per_modell", "`resources.gpus_per_model`"),
        ("source.modle", "`source.model`"),
        ("search.gates.penlty", "`search.gates.penalty`"),
        ("search.greedy.kk", "`search.greedy.k`"),
        ("sweep.race.rung", "`sweep.race.rungs`"),
        ("zzz", "plan --help"),
    ],
)
def test_a_key_that_is_none_is_named_with_the_nearest(place: str, near: str) -> None:
    with pytest.raises(RecipeError, match=rf"here: `{place}` is not a key of a recipe\..*{near}"):
        parse_recipe(changed(WHOLE, place, 1), "here")


@pytest.mark.parametrize(
    "place", ["name", "source", "target", "task", "sweep", "source.model", "task.data", "task.prompt", "sweep.k"]
)
def test_what_has_no_default_must_be_there(place: str) -> None:
    made = copy.deepcopy(LEAST)
    *parts, last = place.split(".")
    del (made[parts[0]] if parts else made)[last]  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=f"`{place}` is missing; it has no default"):
        parse_recipe(made)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed(changed(WHOLE, "sweep.k", [0]), "nam", "x"), "here")
    assert [line.split(" is ")[0] for line in str(caught.value).splitlines()] == ["here: `sweep.k.0`", "here: `nam`"]


INF, NAN = float("inf"), float("nan")
OUT_OF_RANGE: list[tuple[str, Sequence[Any]]] = [
    ("name", ["", "../up", "a/b", "..", ".hidden", "-x", "a b", "x\n", "x\0", "a" * 101, 7, None]),
    ("source", ["org/new", None, []]),
    ("source.model", [None, 3, ["a"]]),
    ("target.revision", [3, ["a"]]),
    ("task.data", [None, 3, ["a"], {}, {"path": "x"}, {"path": "x", "split": "y", "splt": "z"}]),
    ("task.prompt", [None, 3]),
    ("task.answer", [None, ["{answer}"]]),
    ("task.scorer", ["exakt", "", None]),
    ("task.max_new_tokens", [0, -1, 1.5, INF, NAN, True, "many"]),
    ("task.stop", ["\n", [""], [3], None]),
    ("task.chat_template", [None, "perhaps", 2]),
    ("task.split.probe", [0, -5, 2.5, True, None]),
    ("task.split.select", [0, "half"]),
    ("task.split.test", [0]),
    ("task.split.seed", [1.5, None, "x", False]),
    ("rank.by", [[], "lae", ["lae", "lae"], ["leo"], [3], None]),
    ("rank.trajectory", ["mine", None]),
    ("rank.max_new_tokens", [0, -1, 2.5]),
    ("sweep.k", [[], 3, [0], [-1], [1, 1], [1.5], [True], [None], None]),
    ("sweep.kind", [[], "attn", ["attn", "attn"], [3]]),
    ("sweep.alpha", [[], [0], [0.0], [1.01], [-0.5], [NAN], [INF], [0.5, 0.5], [True]]),
    ("sweep.screen.keep", [0, 1, -1, "x"]),
    ("sweep.screen.by", ["accuracy"]),
    ("sweep.race.rungs", [[], [0], [50, 20], [50, 50], 50]),
    ("sweep.race.keep", [0, 1]),
    ("sweep.controls.random", [0, 2, 2.5]),
    ("sweep.controls.alpha", [[], [0.0], [1.0], [0.5, 0.5], [NAN]]),
    ("search", ["", 3, [], ["gates", 3], ["gates", "gates"], True]),
    ("search.gates", ["row", [], True, 3]),
    ("search.gates.unit", ["channel", None, True]),
    ("search.gates.penalty", [[], 0.3, [-0.1], [1, 1.0], [INF], [NAN], [True], None]),
    ("search.gates.steps", [0, 1.5, True, None]),
    ("search.gates.learning_rate", [0, -1, 1.1, NAN, True]),
    ("search.greedy.k", [0, 2.5, True, "all"]),
    ("search.greedy.kind", [None, ["ffn"]]),
    ("resources.gpus_per_model", [-1, 1.5, INF, NAN, True, "all"]),
    ("resources.cpus_per_model", [0, -1, INF, NAN]),
    ("resources.evaluators", [0, 1.5]),
    ("resources.dtype", ["float64", "fp32", None]),
    ("resources.batch_size", [0]),
    ("resources.shard_size", [0]),
    ("tracking.upload", ["all", None, False]),
    ("tracking.uri", [None]),
    ("tracking.patience", [-1, None, "soon", float("inf")]),
    ("storage", [None, 3]),
    ("accept", ["pickle", ["anything"], None]),
]


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in OUT_OF_RANGE for value in values])
def test_a_value_out_of_range_is_named_with_its_place(place: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"here: `{place}"):
        parse_recipe(changed(WHOLE, place, value), "here")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("sweep.k", [1, 0], r"`sweep\.k\.1` is 0: Input should be greater than or equal to 1"),
        ("rank.by", ["lea"], r"unknown ranker 'lea'; expected one of \['attribution', .*\] \(nearest: lae\)"),
        ("task.scorer", "exakt", r"unknown scorer 'exakt'.*nearest: exact"),
        ("task.scorer", "regex", r"a pattern is missing: write \{regex: "),
        ("task.scorer", {"regex": "a: \\d+"}, "task.scorer: the pattern has 0 groups, expected one, around the answer"),
        ("task.scorer", {"regex": "(a): (\\d+)"}, "the pattern has 2 groups, expected one"),
        ("task.scorer", {"regex": "("}, r"the pattern is no regular expression \(missing \)"),
        ("task.scorer", "regex:(", "the pattern is no regular expression"),
        ("task.scorer", {"regexp": "(a)"}, r"expected a name, or \{regex: PATTERN\}"),
        ("task.scorer", {"regex": 3}, "expected a name, or"),
        ("task.name", "gsm8", r"unknown task 'gsm8'; expected one of \['math500', 'gsm8k'\] \(nearest: gsm8k\)"),
        ("resources.gpus_per_model", 1.5, "Ray shares fractions of one GPU, or gives whole ones"),
        ("sweep.kind", ["ffn", "ffn"], r"\['ffn', 'ffn'\] has a value twice"),
        ("task.data", {"path": "x"}, r"`task\.data\.split` is missing"),
        ("sweep.k", [True], r"`sweep\.k` is \[True\]: true and false are not expected here"),
        ("search", "gate", r"unknown search 'gate'; expected one of \['gates', 'greedy'\] \(nearest: gates\)"),
        ("search", {"greed": {}}, r"unknown search 'greed'.*nearest: greedy"),
        ("search", 3, "expected a name, a list of names, or a mapping name → settings"),
        ("search", [], "names no search; expected some of"),
        ("search", {}, "search: names no search; expected some of"),
        ("search", {"gates": None, "greedy": None}, "search: names no search"),
        ("search", {"gates": {"steps": 0}}, r"`search\.gates\.steps` is 0"),
    ],
)
def test_the_message_says_what_was_found_and_expected(place: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(changed(WHOLE, place, value))


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "a..b", "7", "x" * 100])
def test_a_plain_name_is_good(name: str) -> None:
    assert parse_recipe(changed(WHOLE, "name", name)).name == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task.chat_template": False}, "`system` has no effect without `chat_template: true`"),
        ({"rank.by": ["depth"], "rank.max_new_tokens": None}, r"\['trajectory'\] has no effect: none of \['depth'\] measures"),
        ({"rank.by": ["depth", "random"], "rank.trajectory": "own"}, r"\['max_new_tokens'\] has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(change: dict[str, Any], words: str) -> None:
    made = WHOLE
    for place, value in change.items():
        made = changed(made, place, value)
    with pytest.raises(RecipeError, match=words):
        parse_recipe(made)


# Searches.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gates", {"gates": {}}),
        (["greedy"], {"greedy": {}}),
        (["gates", "greedy"], {"gates": {}, "greedy": {}}),
        ({"gates": None, "greedy": {"k": 3}}, {"greedy": {"k": 3}}),
    ],
)
def test_a_search_is_named_listed_or_spelled_out(written: Any, meant: Any) -> None:
    recipe = parse_recipe({**LEAST, "search": written})
    assert recipe == parse_recipe({**LEAST, "search": meant})
    assert recipe.search is not None
    asked = [name for name in ("gates", "greedy") if getattr(recipe.search, name) is not None]
    assert asked == sorted(meant)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.identity() != parse_recipe(LEAST).identity()


def test_a_search_starts_from_the_methods_settings() -> None:
    search = parse_recipe({**LEAST, "search": ["gates", "greedy"]}).search
    assert search is not None
    assert search.gates is not None
    assert search.greedy is not None
    assert (search.gates.unit, search.gates.steps, search.gates.kind) == ("row", 60, "all")
    assert search.gates.penalty == search.greedy.penalty == (0.0, 0.3, 1.0, 3.0)
    assert search.greedy.k is None


# YAML.


@pytest.mark.parametrize(
    "text", ["name: a\nname: b\n", "name: a\nsweep: {k: [1], k: [2]}\n", "name: a\ntask:\n  prompt: x\n  prompt: y\n"]
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not valid YAML: key '(name|k|prompt)' is given twice"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.getcwd", "!!python/object/new:os.mkdir", "!mine"]
)
def test_tags_that_build_objects_are_refused_and_build_nothing(whole: Path, tag: str) -> None:
    made = whole.parent / "made"
    evil = whole.with_name("evil.yaml")
    evil.write_text(f"name: {tag} ['{made}']\n")
    for path, overrides in ((evil, []), (whole, [f"name={tag} ['{made}']"])):
        with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
            load_recipe(path, overrides)
    assert not made.exists()


@pytest.mark.parametrize(
    "text",
    [
        "name: !!int x", "name: 2024-13-45", "name: !!map x", "name: !!bool x", "name: !!timestamp x", "name: !!float x",
        "name: !!int ''",
        "name: [1", "? [1, 2]\n: 3", "<<: [1]", "name: *nothing", "a: b: c", "\tname: x", "name: \x07", "[" * 400,
    ],
)  # fmt: skip
def test_text_that_is_not_yaml_is_refused(tmp_path: Path, text: str, whole: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml: not valid YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"override .*: the value is not valid YAML"):
        load_recipe(whole, [f"name={{{text}}}"])


SECRET_OVERRIDES = {
    "tracking=postgresql://mlflow:open-sesame@db/mlflow": "`tracking` is 'postgresql://db/mlflow': Input should be a valid",
    "storage=[s3://k:open-sesame@b/r]": "`storage` is ['s3://b/r']: Input should be a valid string.",
    "sweep.k=http://me:open/sesame@h/x?token=open": "`sweep.k` is 'http://h/x?token=***': ",
    "source.model=[http://h, 'http://me:open sesame@h']": "`source.model` is ['http://h', 'http://h']: Input should be a valid",
    "tracking.uri:http://me:open-sesame@mlflow": "override 'tracking.uri:http://mlflow': expected key=value, for example sweep.k=",
    "tracking.uri:http://me:open-sesame@mlflow=1": "`tracking.uri:http://mlflow` is not a key of a recipe",
    "tracking.uri=[http://me:open-sesame@mlflow": "override 'tracking.uri=[http://mlflow': the value is not valid YAML: while",
    "storage={x: s3://user:open-sesame@bucket/runs/of/mine/that/are/many, y: [}": "is not valid YAML: while parsing a flow",
    "storage=!!int http://me:open-sesame@h": "the value is not valid YAML: a value cannot be read (ValueError: invalid literal",
    f"source.model=http://me:open-sesame@{'h' * 5000}": "cannot be a path (File name too long).",
    f"storage=['s3://k:open-sesame{'x' * 300}@b/r']": "`storage` is ['s3://b/r']: ",
}


@pytest.mark.parametrize("override", SECRET_OVERRIDES)
def test_no_refusal_tells_the_password_of_an_address_at_a_wrong_place(whole: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(whole, [override])
    assert SECRET_OVERRIDES[override] in str(caught.value)
    assert not re.search("open|sesame|mlflow:", str(caught.value).replace(str(whole), ""))


def test_of_a_broken_line_only_one_with_a_password_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for line, shown in (("uri: http://me:open-sesame@h: [", False), ("uri: http://h: [", True)):
        path.write_text(f"tracking:\n  {line}\n")
        with pytest.raises(RecipeError, match="line 2") as caught:
            load_recipe(path)
        assert (line in str(caught.value)) is shown
        assert "sesame" not in str(caught.value)


def test_a_long_text_full_of_slashes_is_refused_without_a_wait(whole: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RecipeError):
        load_recipe(whole, ["storage=[" + "//a:" * 100_000 + "]"])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("content", "found"), [(b"", "NoneType"), (b"- a\n- b\n", "list"), (b"text", "str"), (b"3", "int")])
def test_a_recipe_is_a_mapping(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=f"found {found}, expected a mapping with the keys of a recipe"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    for path in (tmp_path / "binary.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match=f"{path}: cannot be read .*Give the path of a YAML recipe"):
            load_recipe(path)


# Overrides.


def test_overrides_replace_single_values_and_keep_the_rest(whole: Path) -> None:
    overrides = [
        "sweep.k=[5, 6]",
        "task.split.seed=7",
        "resources.gpus_per_model=0.25",
        "rank.max_new_tokens=",
        "name=other",
        "sweep.k=[9]",
    ]
    expected = changed(changed(changed(WHOLE, "sweep.k", [9]), "task.split.seed", 7), "resources.gpus_per_model", 0.25)
    expected = changed(changed(expected, "rank.max_new_tokens", None), "name", "other")
    assert load_recipe(whole, overrides).model_dump(mode="json") == expected


def test_an_override_may_hold_an_equals_sign(whole: Path) -> None:
    assert load_recipe(whole, ["task.prompt='{prompt} = '"]).task.prompt == "{prompt} = "


def test_an_override_may_put_a_mapping_in_the_place_of_a_path_and_back(whole: Path, tmp_path: Path) -> None:
    recipe = load_recipe(whole, ["task.data={path: org/data, split: test}"])
    assert recipe.task.data == HubData(path="org/data", split="test")
    write(whole, changed(WHOLE, "task.data", {"path": "org/data", "split": "test"}))
    assert load_recipe(whole, [f"task.data={tmp_path}/x.jsonl"]).task.data == f"{tmp_path}/x.jsonl"
    assert load_recipe(whole, ["task.data.split=train"]).task.data == HubData(path="org/data", split="train")


@pytest.mark.parametrize("alpha", [1.5, -0.5])
def test_coefficients_outside_the_range_have_to_be_meant(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"`sweep\.alpha` .* is outside \(0, 1\]; add `sweep\.extrapolate: true`"):
        parse_recipe(changed(WHOLE, "sweep.alpha", [alpha]))
    meant = changed(changed(WHOLE, "sweep.alpha", [alpha]), "sweep.extrapolate", True)
    assert parse_recipe(meant).sweep.alpha == (alpha,)
    with pytest.raises(RecipeError, match="0 is the target itself"):
        parse_recipe(changed(meant, "sweep.alpha", [0]))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("sweep.race.rungs", [50, 300], "`sweep.race`: rung 300 has no effect, for there are 300 select examples"),
        ("task.scorer", "forced", "`stop` has no effect with `scorer: forced`"),
        ("resources.batch_size", 0, "expected a number of rows, 1 or more, or `auto`"),
        ("resources.batch_size", "fast", "expected a number of rows, 1 or more, or `auto`"),
    ],
)
def test_a_setting_of_the_engine_without_effect_is_refused(place: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe(changed(WHOLE, place, value))


@pytest.mark.parametrize("override", ["sweep.k", "=1", "sweep..k=[1]", ".k=1", "k.=1", ""])
def test_an_override_that_is_no_assignment_is_refused(whole: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"override '.*': expected key=value, for example sweep\.k=\[1,2\]"):
        load_recipe(whole, [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.kk=[1]", r"`sweep\.kk` is not a key.*`sweep\.k`"),
        ("sweep.k=[0]", r"`sweep\.k\.0` is 0"),
        ("name.x=1", "`name` is"),
        ("sweep={k: [1], k: [2]}", "key 'k' is given twice"),
    ],
)
def test_an_override_is_checked_like_the_recipe(whole: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(whole, [override])


# Paths.


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in one folder, the working directory in another; both have a folder `here` with models."""
    for folder in ("recipes", "work"):
        for model in ("old", "new"):
            (tmp_path / folder / "here" / model).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    made = {
        **LEAST,
        "source": {"model": "here/new"},
        "target": {"model": "./not/there"},
        "task": {**LEAST["task"], "data": "d.jsonl"},
    }  # type: ignore[dict-item]
    write(tmp_path / "recipes" / "recipe.yaml", made)
    return tmp_path


def test_inputs_are_relative_to_the_recipe_and_results_to_the_working_directory(apart: Path) -> None:
    recipe = load_recipe("../recipes/recipe.yaml")
    assert recipe.source.model == str(apart / "recipes" / "here" / "new")
    assert Path(recipe.target.model) == apart / "recipes" / "not" / "there"
    assert recipe.task.data == str(apart / "recipes" / "d.jsonl")
    assert (recipe.storage, recipe.tracking.uri) == ("runs", "sqlite:///mlflow.db")


def test_inputs_in_overrides_are_relative_to_the_working_directory(apart: Path) -> None:
    recipe = load_recipe("../recipes/recipe.yaml", ["source.model=here/new", "task.data=d.jsonl", "target={model: ./x}"])
    assert recipe.source.model == str(apart / "work" / "here" / "new")
    assert recipe.task.data == str(apart / "work" / "d.jsonl")
    assert Path(recipe.target.model) == apart / "work" / "x"


@pytest.mark.parametrize("name", ["org/model", "gpt2", "zoo:siblings/source"])
def test_what_is_no_path_stays_as_it_is(apart: Path, name: str) -> None:
    write(apart / "recipes" / "recipe.yaml", changed(WHOLE, "source.model", name))
    assert load_recipe("../recipes/recipe.yaml", [f"target.model={name}"]).source.model == name
    assert load_recipe("../recipes/recipe.yaml", [f"target.model={name}"]).target.model == name


def test_a_home_is_expanded_and_an_absolute_path_stays(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(apart))
    recipe = load_recipe(
        "../recipes/recipe.yaml", ["source.model=~/m", "target.model=/m", "task.data=zoo:siblings/tasks/lost.jsonl"]
    )
    assert (recipe.source.model, recipe.target.model) == (f"{apart}/m", "/m")
    assert recipe.task.data == "zoo:siblings/tasks/lost.jsonl"


@pytest.mark.parametrize("text", ["~nobody-of-this-name/model", "x" * 5000])
def test_a_text_that_cannot_be_a_path_is_refused(whole: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be a path"):
        load_recipe(whole, [f"source.model={text}"])


# Identity, and writing again.


def leaves(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [(f"{prefix}{key}", value) for key, value in mapping.items()]
    return [leaf for place, value in inner for leaf in (leaves(value, f"{place}.") if isinstance(value, dict) else [place])]


OTHER = {
    "name": "other", "source.model": "org/x", "source.revision": "v1", "target.model": "org/x", "target.revision": "v1",
    "base.model": "org/x", "base.revision": "v2",
    "task.data": "/x.jsonl",
    "task.prompt": "{x}", "task.answer": "{x}", "task.max_new_tokens": 9, "task.stop": ["x"], "task.system": "x",
    "task.shots.num": 3, "task.shots.data": "/x.jsonl",
    "task.split.probe": 7, "task.split.select": 270, "task.split.test": 7, "task.split.seed": 7, "rank.by": ["depth", "lae"],
    "rank.trajectory": "own", "rank.max_new_tokens": 7, "sweep.k": [7], "sweep.kind": ["attn"], "sweep.alpha": [1.0],
    "sweep.extrapolate": True,
    "sweep.loss": False, "sweep.screen.keep": 0.5, "sweep.race.rungs": [50], "sweep.race.keep": 0.5,
    "sweep.arms": 30, "sweep.controls.random": 7, "sweep.controls.alpha": [0.1],
    "search.gates.penalty": [2.0], "search.gates.kind": "attn", "search.gates.unit": "row", "search.gates.steps": 7,
    "search.gates.learning_rate": 0.5, "search.greedy.penalty": [2.0], "search.greedy.kind": "ffn", "search.greedy.k": 7,
    "sweep.objective.price": 0.7, "sweep.objective.veto": False,
    "guards.tasks.reversal.data": "/x.jsonl", "guards.tasks.reversal.prompt": "{x}", "guards.tasks.reversal.answer": "{x}",
    "guards.tasks.reversal.scorer": "number", "guards.tasks.reversal.max_new_tokens": 9, "guards.tasks.reversal.stop": ["x"],
    "guards.tasks.reversal.chat_template": True, "guards.tasks.reversal.margin": 0.2,
    "guards.tasks.reversal.split.probe": 7, "guards.tasks.reversal.split.select": 7, "guards.tasks.reversal.split.test": 7,
    "guards.tasks.reversal.split.seed": 7,
    "guards.text.data": "/x.jsonl", "guards.text.text": "{x}", "guards.text.tokens": 7, "guards.text.split.probe": 7,
    "guards.text.split.select": 7, "guards.text.split.test": 7, "guards.text.split.seed": 7,
    "sweep.controls.merges": ["ties"], "sweep.controls.scales": [1.0], "sweep.controls.density": 0.3,
    "resources.dtype": "float16", "resources.batch_size": 7,
    "resources.shard_size": 7, "accept": [],
}  # fmt: skip
MATTERS_NOT = {
    "resources.address": "ray://x", "resources.gpus_per_model": 1, "resources.cpus_per_model": 1, "resources.evaluators": 1,
    "resources.labels.source.role": "x", "resources.labels.evaluator.room": "x", "resources.accelerator_type": "L4",
    "resources.wait": 7,
    "tracking.uri": "http://x", "tracking.experiment": "x", "tracking.upload": "none", "tracking.patience": 5,
    "storage": "elsewhere", "ledger": False,
}  # fmt: skip
LEFT_OUT = {
    "task.scorer",
    "task.choices",
    "task.lm_eval",
    "task.num_fewshot",
    "task.metric",
    "task.filter",
    "task.shots.separator",
    "task.chat_template",
    "sweep.screen.by",
    "rank.steps",
    "sweep.primary",
    "sweep.channels",
    "guards.held_out",
    *(f"guards.tasks.spared.{leaf}" for leaf in leaves(GUARD)),
    *(f"guards.tasks.reversal.{key}" for key in ("system", "choices", "shots", "lm_eval", "num_fewshot", "metric", "filter")),
}  # tried below and in another file


def test_every_field_is_tried_below() -> None:
    assert {*OTHER, *MATTERS_NOT, *LEFT_OUT} == set(leaves(WHOLE))


@pytest.mark.parametrize("place", OTHER)
def test_the_identity_changes_with_what_can_change_a_result(place: str) -> None:
    assert parse_recipe(changed(WHOLE, place, OTHER[place])).identity() != parse_recipe(WHOLE).identity()


def test_the_identity_changes_with_the_scorer() -> None:
    plain = changed(WHOLE, "task.stop", [])
    assert parse_recipe(changed(plain, "task.scorer", "forced")).identity() != parse_recipe(plain).identity()


def test_the_identity_changes_with_choices_and_separators() -> None:
    kept = [parse_recipe({**LEAST, "task": {**CHOOSING, "choices": choices}}).identity() for choices in ("a", " {a}", ["x", "y"])]
    shots = [{"num": 2, "separator": separator} for separator in ("\n\n", "\n")]
    kept += [parse_recipe({**LEAST, "task": {**LEAST["task"], "shots": each}}).identity() for each in shots]
    assert len(set(kept)) == 5


def test_a_pattern_survives_yaml_and_is_part_of_the_identity(tmp_path: Path) -> None:
    plain = changed(WHOLE, "task.stop", [])
    recipes = [parse_recipe(changed(plain, "task.scorer", {"regex": pattern})) for pattern in (r"a: (\d+)", r"(?i)'\"a\": (.+)\n")]
    assert recipes[0].task.scorer == r"regex:a: (\d+)"
    assert recipes[0].identity() != recipes[1].identity()
    for recipe in recipes:
        check_written_again(recipe, tmp_path / "again.yaml")


def test_a_named_task_is_written_as_what_it_stands_for(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", {**LEAST, "task": {"name": "gsm8k", "max_new_tokens": 256, "data": "d.jsonl"}})
    recipe = load_recipe(path, ["task.scorer.regex='#### (.+)'"])
    assert (recipe.task.data, recipe.task.scorer) == (str(tmp_path / "d.jsonl"), "regex:#### (.+)")
    check_written_again(recipe, tmp_path / "again.yaml")
    assert "name: gsm8k" not in recipe.to_yaml()


def test_the_identity_changes_with_the_chat_template() -> None:
    plain = changed(WHOLE, "task.system", None)
    assert parse_recipe(plain).identity() != parse_recipe(changed(plain, "task.chat_template", False)).identity()


@pytest.mark.parametrize("place", MATTERS_NOT)
def test_the_identity_stays_with_what_cannot(place: str) -> None:
    other = parse_recipe(changed(WHOLE, place, MATTERS_NOT[place]))
    assert other != parse_recipe(WHOLE)
    assert other.identity() == parse_recipe(WHOLE).identity()


def test_spelling_a_default_out_changes_nothing(tmp_path: Path) -> None:
    least = load_recipe(write(tmp_path / "least.yaml", LEAST))
    spelled = load_recipe(write(tmp_path / "spelled.yaml", changed(LEAST, "rank.trajectory", "own")))
    assert least == spelled
    assert least.identity() == spelled.identity()


def check_written_again(recipe: Recipe, path: Path) -> None:
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.identity() == recipe.identity()


@pytest.mark.parametrize("by", [["lae"], ["depth"], ["random", "depth"]])
@pytest.mark.parametrize("data", ["/d.jsonl", {"path": "org/data", "split": "test"}])
def test_what_is_read_can_be_written_and_read_again(tmp_path: Path, by: list[str], data: Any) -> None:
    check_written_again(parse_recipe(changed(changed(LEAST, "rank.by", by), "task.data", data)), tmp_path / "again.yaml")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=5)), alpha=st.floats(0, 1, exclude_min=True))
def test_any_text_and_number_survives_yaml(tmp_path: Path, prompt: str, stop: list[str], alpha: float) -> None:
    made = changed(changed(changed(WHOLE, "task.prompt", prompt), "task.stop", stop), "sweep.alpha", [alpha])
    check_written_again(parse_recipe(made), tmp_path / "again.yaml")


# Whatever a file holds, the answer is a recipe or a RecipeError.

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, 1.5, 0.5, INF, -INF, NAN, "", "x", "lae", "../..", "~nobody-of-this-name", "x" * 5000,
    "\0", "é",
    [], [None], [1, 1], ["x"], [[1]], {}, {"a": 1}, {"path": "x", "split": "y"}, {1: 2}, {None: None}, [{}], "2024-01-01", b"bytes",
)  # fmt: skip


def mutate(mapping: dict[Any, Any], rng: random.Random) -> None:
    """Change, drop, rename or add a key somewhere."""
    inner = mapping
    while rng.random() < 0.6 and (deeper := [value for value in inner.values() if isinstance(value, dict) and value]):
        inner = rng.choice(deeper)
    key = rng.choice(list(inner))
    value = copy.deepcopy(rng.choice(ODD))
    match rng.choice(("set", "drop", "rename", "add")):
        case "set":
            inner[key] = value
        case "drop" if len(inner) > 1:
            del inner[key]
        case "rename":
            inner[rng.choice((f"{key}s", str(key)[1:], 3, None))] = inner.pop(key)
        case _:
            inner[rng.choice(("k", "model", "extra", 1, 2.5))] = value


def read_or_refuse(path: Path, again: Path) -> Recipe | None:
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return None
    check_written_again(recipe, again)
    return recipe


def test_a_mutated_recipe_is_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    read = 0
    for _ in range(300):
        mapping = copy.deepcopy(WHOLE)
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutate(mapping, rng)
        read += read_or_refuse(write(tmp_path / "recipe.yaml", mapping), tmp_path / "again.yaml") is not None
    assert 10 < read < 250  # both happen


def test_mutated_text_is_read_or_refused(tmp_path: Path) -> None:
    rng, read = random.Random(1), 0
    whole = yaml.safe_dump(WHOLE)
    for _ in range(100):
        text = list(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            text[place : place + rng.choice((0, 1, 5))] = rng.choice(
                ("", ":", "\n", "!", "&a ", "*a", "[", "{", "'", "!!int ", "- ", "\t", "\0")
            )
        (tmp_path / "recipe.yaml").write_text("".join(text))
        read += read_or_refuse(tmp_path / "recipe.yaml", tmp_path / "again.yaml") is not None
    assert 0 < read < 100  # both happen


# Choices.

CHOOSING = {"data": "d.jsonl", "prompt": "{q}", "answer": "{a}", "scorer": "choice", "choices": "options"}


@pytest.mark.parametrize("choices", ["options", " {options}", ["yes", "no"]])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("choice", "choice"), ({"choice": "tokens"}, "choice:tokens"), ({"choice": "characters"}, "choice:characters")],
)
def test_choices_need_no_limit_and_survive_yaml(given: Any, kept: str, choices: Any) -> None:
    recipe = parse_recipe({**LEAST, "task": {**CHOOSING, "scorer": given, "choices": choices}})
    assert (recipe.task.scorer, recipe.task.max_new_tokens, recipe.task.chooses) == (kept, None, True)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 4}, "`stop` and `max_new_tokens` have no effect with `scorer: choice`"),
        ({"stop": ["x"]}, "`stop` and `max_new_tokens` have no effect with `scorer: choice`"),
        ({"choices": None}, "`choices` and `scorer: choice` go together"),
        ({"scorer": "exact", "max_new_tokens": 4}, "`choices` and `scorer: choice` go together"),
        ({"choices": ["one"]}, "expected two templates or more"),
        ({"choices": ["one", "one"]}, "has a value twice"),
        ({"scorer": "choice:letters"}, "unknown scorer 'choice:letters'; expected one of .*choice:tokens"),
        ({"scorer": {"choice": 3}}, "expected a name, or .*{choice: tokens}"),
        ({"scorer": {"choice": "tokens", "regex": "(x)"}}, "expected a name, or .*{choice: tokens}"),
        ({"scorer": {"choose": "tokens"}}, "expected a name, or .*{choice: tokens}"),
        ({"scorer": "exact", "choices": None}, r"`max_new_tokens` is missing; it has no default"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe({**LEAST, "task": {**CHOOSING, **changes}})


# Shots.


def test_shots_are_read_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "task": {**LEAST["task"], "shots": {"num": 2, "data": "shots.jsonl"}}}))
    shots = load_recipe(path).task.shots
    assert shots is not None
    assert (shots.num, shots.separator, shots.data) == (2, "\n\n", str(tmp_path / "shots.jsonl"))
    assert load_recipe(path, ["task.shots.data=/other.jsonl"]).task.shots == shots.model_copy(update={"data": "/other.jsonl"})
    assert load_recipe(path, ["task.shots="]).task.shots is None


@pytest.mark.parametrize(
    ("shots", "words"),
    [
        ({}, r"`task.shots.num` is missing"),
        ({"num": 0}, r"`task.shots.num` is 0"),
        ({"num": 1, "from": "x"}, r"`task.shots.from` is not a key"),
        ({"num": 1, "separator": "\n"}, "`shots.separator` has no effect with `chat_template: true`"),
    ],
)
def test_shots_that_do_not_fit_are_refused(shots: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe({**LEAST, "task": {**LEAST["task"], "chat_template": True, "shots": shots}})


# Tasks of the harness.


def test_a_task_of_the_harness_needs_nothing_else(tmp_path: Path) -> None:
    recipe = parse_recipe({**LEAST, "task": {"lm_eval": "gsm8k", "num_fewshot": 5, "filter": "strict-match"}})
    assert (recipe.task.lm_eval, recipe.task.scorer, recipe.task.max_new_tokens) == ("gsm8k", "lm_eval", None)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "task": {"lm_eval": "tasks/mine.yaml"}}))
    assert load_recipe(path).task.lm_eval == str(tmp_path / "tasks" / "mine.yaml")
    assert load_recipe(path, ["task.lm_eval=gsm8k"]).task.lm_eval == "gsm8k"


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"lm_eval": "gsm8k", "prompt": "{q}"}, r"\['prompt'\] has no effect with `lm_eval`"),
        ({"lm_eval": "gsm8k", "scorer": "math", "stop": ["x"]}, r"\['scorer', 'stop'\] has no effect with `lm_eval`"),
        ({"lm_eval": "gsm8k", "name": "gsm8k"}, r"\['name'\] has no effect"),
        ({"lm_eval": "gsm8k", "shots": {"num": 2}}, r"\['shots'\] has no effect"),
        ({"lm_eval": "gsm8k", "num_fewshot": -1}, r"`task.num_fewshot` is -1"),
        ({"lm_eval": ""}, r"`task.lm_eval` is ''"),
        ({**LEAST["task"], "num_fewshot": 2}, r"\['num_fewshot'\] has no effect without `lm_eval: TASK`"),
        ({**LEAST["task"], "metric": "acc", "filter": "x"}, r"\['metric', 'filter'\] has no effect without"),
        ({**LEAST["task"], "scorer": "lm_eval"}, "`scorer: lm_eval` comes with `lm_eval: TASK`"),
        ({"lm_eval": "gsm8k", "system": "x"}, "`system` has no effect without `chat_template: true`"),
    ],
)
def test_settings_that_a_task_of_the_harness_brings_itself_are_refused(task: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe({**LEAST, "task": task})


def test_the_identity_changes_with_the_task_of_the_harness() -> None:
    others = [{}, {"num_fewshot": 2}, {"metric": "acc"}, {"filter": "x"}]
    recipes = [parse_recipe({**LEAST, "task": {"lm_eval": "gsm8k", **more}}) for more in others]
    assert len({recipe.identity() for recipe in (*recipes, parse_recipe({**LEAST, "task": {"lm_eval": "mmlu"}}))}) == 5
