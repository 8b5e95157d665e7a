"""The command line over spoilt inputs: a plan, or one of our errors in red and exit code 2. Never a traceback."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hostile import JSON_TEXTS, YAML_TEXTS, Hand
from tiny import save_tiny, write_recipe

from transplant_ray import cli, errors

NAMES = {name for name in vars(errors) if not name.startswith("_")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_tiny(folder / "source", seed=1, num_hidden_layers=1)
    save_tiny(folder / "target", seed=2, num_hidden_layers=1, shard="20KB")
    write_recipe(folder, sweep={"k": [1], "kind": ["all"]})
    return folder


@pytest.fixture
def place(pair: Path, tmp_path: Path) -> Path:
    """The pair by links: what is written over is written beside the original."""
    for path in pair.rglob("*"):
        copy = tmp_path / path.relative_to(pair)
        copy.mkdir() if path.is_dir() else copy.symlink_to(path)
    recipe = json.loads((pair / "recipe.yaml").read_text())
    recipe["task"]["data"] = "task.jsonl"
    write(tmp_path / "recipe.yaml", json.dumps(recipe).encode())
    return tmp_path


def write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def spoil(place: Path, kind: str, hand: Hand) -> None:
    recipe, task = place / "recipe.yaml", place / "task.jsonl"
    weights, index = place / "source" / "model.safetensors", place / "target" / "model.safetensors.index.json"
    if kind == "recipe":
        write(recipe, hand.json(json.loads(recipe.read_text()), YAML_TEXTS).encode())
    elif kind == "header":
        content = weights.read_bytes()
        write(weights, hand.bytes(content[:3000]) + content[3000:])
    elif kind == "index":
        write(index, hand.json(json.loads(index.read_text()), JSON_TEXTS).encode())
    elif kind == "task":
        lines = task.read_text().splitlines()
        lines[0] = hand.json(json.loads(lines[0]), JSON_TEXTS)
        write(task, "\n".join(lines).encode())
    else:
        write(recipe, hand.bytes(recipe.read_bytes()))


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[int, str]:
    """Exit code and what was said to people, through streams that hold UTF-8 and nothing else, as a terminal's do."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "argv", ["transplant-ray", *argv])
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    out.flush()
    err.flush()
    assert isinstance(err.buffer, io.BytesIO)
    return code, err.buffer.getvalue().decode()


@pytest.mark.parametrize("kind", ["recipe", "header", "index", "task", "text"])
@pytest.mark.parametrize("seed", range(6))
def test_no_input_brings_a_traceback(place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    spoil(place, kind, Hand(f"cli {kind} {seed}"))
    code, said = run(monkeypatch, "plan", str(place / "recipe.yaml"))
    assert "Traceback" not in said
    assert code == 0 or (code == 2 and said.partition(":")[0] in NAMES), said
    assert sorted(path.name for path in place.iterdir()) == ["recipe.yaml", "source", "target", "task.jsonl"]


def test_the_pair_is_good_before_it_is_spoilt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "plan", str(place / "recipe.yaml"))[0] == 0


@pytest.mark.parametrize("key", ["source.model", "task.data", "guards.text.data"])
@pytest.mark.parametrize(
    "value",
    ["x" * 300, "x" * 5000 + ".jsonl", '"\\0.jsonl"', '"\\ud800.jsonl"', "/proc/self/mem"],
)
def test_no_path_brings_a_traceback(place: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    code, said = run(monkeypatch, "plan", str(place / "recipe.yaml"), f"{key}={value}")
    assert "Traceback" not in said
    assert code == 0 or (code == 2 and said.partition(":")[0] in NAMES), said
