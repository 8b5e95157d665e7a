"""`transplant-ray organ`: every command's help, what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration.helpers import folder_bytes, run_main
from stacks import load, logits, save_model

import transplant_ray
from transplant_ray import cli_organ


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a recipient, one that is wider, and an organ of the source, made by the command line."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed, changes in (("source", 1, {}), ("recipient", 2, {}), ("wide", 3, {"hidden_size": 64, "intermediate_size": 96})):
        save_model(folder / name, seed=seed, **changes)
    finished = run_main(
        "organ", "extract", "--model", folder / "source", "--layers", "1-3", "--licence", "mit", "--out", folder / "organ"
    )
    assert finished.code == 0, finished.err
    assert "layers 1-3 of 6" in finished.out
    return folder


COMMANDS = ("compare", "demo", "extract", "insert", "remove", "show", "sweep", "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    finished = run_main("organ", command, "--help")
    assert finished.code == 0
    assert f"transplant-ray organ {command}" in finished.out
    purpose = next(c.callback for c in cli_organ.organ_app.registered_commands if c.callback.__name__ == command).__doc__
    assert " ".join(purpose.split("\n\n")[0].split(":")[0].split()) in " ".join(finished.out.split())


def test_the_commands_are_these() -> None:
    finished = run_main("organ", "--help")
    assert finished.code == 0
    assert all(command in finished.out for command in COMMANDS)
    assert {each.callback.__name__ for each in cli_organ.organ_app.registered_commands if each.callback} == set(COMMANDS)


def test_help_says_how_layers_and_positions_are_counted() -> None:
    words = {name: " ".join(run_main("organ", name, "--help").out.replace("│", " ").split()) for name in COMMANDS}
    assert "counted from 0, both taken" in words["extract"]
    assert "as it is before anything is put in and counted from 0" in words["insert"]


def test_extract_insert_remove(models: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    finished = run_main(
        "organ", "insert", "--recipient", models / "recipient", "--organ", models / "organ", "--at", 1, "--out", out
    )
    assert (finished.code, finished.out) == (0, f"wrote {out}: 9 layers, the recipient has 6\n")
    assert load(out).config.num_hidden_layers == 9
    finished = run_main("organ", "remove", out, "--out", back)
    assert (finished.code, finished.out) == (0, f"wrote {back}\n")
    assert folder_bytes(back) == folder_bytes(models / "recipient")


def test_several_organs_each_with_its_position(models: Path, tmp_path: Path) -> None:
    pairs = [("--organ", models / "organ", "--at", at) for at in (4, 1)]
    for name, given in (("a", pairs), ("b", pairs[::-1])):
        words = [word for pair in given for word in pair]
        assert run_main("organ", "insert", "--recipient", models / "recipient", *words, "--out", tmp_path / name).code == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert load(tmp_path / "a").config.num_hidden_layers == 12


def test_replaced_where_they_were_nothing_changes(models: Path, tmp_path: Path) -> None:
    words = ("--recipient", models / "source", "--organ", models / "organ", "--at", 1, "--mode", "replace")
    assert run_main("organ", "insert", *words, "--out", tmp_path / "out").code == 0
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(models / "source")))


def test_show_says_what_an_organ_is(models: Path) -> None:
    finished = run_main("organ", "show", models / "organ")
    assert finished.code == 0
    lines = [" ".join(line.split()) for line in finished.out.splitlines()]
    for line in (
        f"cut out of {models / 'source'}",
        "layers 1-3 of 6, counted from 0",
        "family llama",
        "licence mit",
        "training none",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("extract --model source --layers 1,3 --out new", "OrganError: layers '1,3': not a contiguous stretch"),
        ("extract --model source --layers 4-6 --out new", "OrganError: layers '4-6': expected a stretch of 0-5"),
        ("extract --model source --out organ", "RunError: organ: is there already"),
        ("extract --model organ --out new", "CheckpointError: organ: config.json cannot be read"),
        ("insert --recipient wide --organ organ --at 1 --out new", "`hidden_size` is 32 in the organ and 64 in the recipient"),
        ("insert --recipient source --organ organ --at 7 --out new", "OrganError: position 7: the recipient has 6 layers"),
        ("insert --recipient source --organ organ --at 4 --mode replace --out new", "expected 0 to 3"),
        ("insert --recipient source --organ organ --at 1 --mode x --out new", "mode 'x': expected one of insert, replace"),
        (
            "insert --recipient source --organ organ --organ organ --at 1 --out new",
            "2 organs and 1 positions. Give --at once for each",
        ),
        (
            "insert --recipient source --organ source --at 1 --out new",
            "OrganError: source/organ.json: not the manifest of an organ",
        ),
        ("insert --recipient source --organ organ --at 1 --vocabulary x --out new", "vocabulary 'x': expected one of refuse, warn"),
        ("remove source --out new", "OrganError: source/insertion.json: nothing can be taken out"),
        ("show nowhere", "OrganError: nowhere/organ.json: not the manifest of an organ"),
    ],
)
def test_what_cannot_be_is_said_and_ends_with_2(models: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str) -> None:
    monkeypatch.chdir(models)
    finished = run_main("organ", *words.split())
    assert finished.code == 2
    assert said in finished.err
    assert "Traceback" not in finished.err
    assert not (models / "new").exists()


def test_another_vocabulary_is_warned_of_where_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", seed=3, vocab_size=60)
    for path in (tmp_path / "other").glob("tokenizer*"):
        path.unlink()
    words = ("--recipient", tmp_path / "other", "--organ", models / "organ", "--at", 1, "--out", tmp_path / "out")
    refused = run_main("organ", "insert", *words)
    assert refused.code == 2
    assert "the organ has seen 46 tokens, the recipient has 60" in refused.err
    warned = run_main("organ", "insert", *words, "--vocabulary", "warn")
    assert warned.code == 0
    assert f"the organ has only seen the embedding of {models / 'source'}" in warned.out
    assert (tmp_path / "out" / "README.md").read_text().count("only seen the embedding") == 1


def test_organ_commands_import_neither_ray_nor_mlflow(models: Path) -> None:
    code = (
        "import sys; from transplant_ray import cli; sys.argv[1:] = ['organ', 'show', sys.argv[1]]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('ray', 'mlflow')))"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(models / "organ")], check=False, stdout=subprocess.DEVNULL)
    assert finished.returncode == 0


def test_from_python_it_is_the_same(models: Path, tmp_path: Path) -> None:
    organ = transplant_ray.extract(str(models / "source"), "1-3", tmp_path / "organ", licence="mit")
    assert folder_bytes(tmp_path / "organ") == folder_bytes(models / "organ")
    insertion = transplant_ray.insert(str(models / "recipient"), [(tmp_path / "organ", 2)], tmp_path / "out", mode="replace")
    assert insertion.placements[0].organ.manifest == organ.manifest
    assert transplant_ray.remove(tmp_path / "out", tmp_path / "back") == tmp_path / "back"
    assert folder_bytes(tmp_path / "back") == folder_bytes(models / "recipient")
    with pytest.raises(transplant_ray.TransplantError, match="no organ: give at least one"):
        transplant_ray.insert(str(models / "recipient"), [], tmp_path / "none")
