"""The command line: every command's help, what it prints, what it writes, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.helpers import SPLIT, Place, Swept, folder_bytes, run_main, weight_bytes

from transplant_ray import cli

COMMANDS = (
    "demo", "plan", "rank", "sweep", "export", "apply", "show", "report", "grade", "submit", "status", "logs", "stop",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    finished = run_main(command, "--help")
    assert finished.code == 0
    assert f"transplant-ray {command}" in finished.out
    purpose = next(c.callback for c in cli.app.registered_commands if c.callback and c.callback.__name__ == command).__doc__
    assert purpose.split(":")[0].split(";")[0].split(",")[0] in " ".join(finished.out.split())


def test_the_commands_are_those_of_the_issue() -> None:
    assert {command.callback.__name__ for command in cli.app.registered_commands if command.callback} == set(COMMANDS)
    finished = run_main("--help")
    assert finished.code == 0
    assert all(command in finished.out for command in COMMANDS)


def test_help_imports_neither_torch_nor_ray_nor_mlflow() -> None:
    # In a process of its own: this one has them all. People ask for help often and should not wait for it.
    code = (
        "import sys; from transplant_ray import cli; sys.argv[1:] = ['sweep', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("argv", [("sweeep",), ("sweep",), ("show", "a", "--every"), ("apply", "delta")])
def test_a_command_line_that_cannot_be_read_ends_with_2(argv: tuple[str, ...]) -> None:
    finished = run_main(*argv)
    assert finished.code == 2
    assert "Usage:" in finished.err
    assert "--help" in finished.err


def test_report_makes_the_report_of_a_sweep_again_byte_for_byte(swept: Swept) -> None:
    before = folder_bytes(swept.folder)
    for name in ("report.html", "variants.csv", "variants.tex"):
        (swept.folder / name).unlink()
    finished = run_main("report", swept.folder)
    assert (finished.code, finished.out.split()) == (0, ["wrote", str(swept.folder / "report.html")])
    assert folder_bytes(swept.folder) == before
    page = (swept.folder / "report.html").read_text(encoding="utf-8")
    measured = swept.results.dropna(subset=["accuracy"])
    assert all(f"{accuracy:.3f}" in page for accuracy in measured["accuracy"])


def test_plan_tells_modules_variants_memory_and_placement_and_writes_nothing(place: Place) -> None:
    recipe = place.recipe()
    before = folder_bytes(place.path)
    finished = run_main("plan", recipe, "resources.evaluators=2")
    assert finished.code == 0, finished.err
    for words in (
        "llama, 3 layers; compatible modules: all 21, attn 12, ffn 9",
        "kind attn: 12 compatible modules; K 16 clipped to 12",
        "variants: 1 target, 1 source, 1 all, 6 trial, 27 control",
        "examples: 8 probe, 40 select, 30 test",
        "memory per probe actor:", "memory per evaluator:",
        "evaluate: 2 evaluators",
    ):  # fmt: skip
        assert words in finished.out, finished.out
    assert folder_bytes(place.path) == before


def test_plan_says_what_the_arms_take(place: Place) -> None:
    """19 arms of a random set for each of the 6 trials. those of all 12 attention modules are the same."""
    words = " ".join(run_main("plan", place.recipe(), "sweep.arms=19").out.split())
    found = re.search(r"arms: 19 of 6 random sets each; at most (\d+) answers more", words)
    assert found, words
    num_sets, rest = divmod(int(found[1]) - 19 * SPLIT["test"], SPLIT["select"])
    assert rest == 0
    assert 19 * 3 < num_sets <= 19 * 5 + 1
    words = " ".join(run_main("plan", place.recipe(), "sweep.primary={by: lae, kind: all, k: 2}").out.split())
    assert f"arms: 19 of one random set each; at most {19 * SPLIT['test']} answers more" in words
    assert "arms:" not in run_main("plan", place.recipe()).out


@pytest.mark.parametrize("task", [{}, {"scorer": "loss", "max_new_tokens": None}])
def test_plan_measures_on_request(place: Place, task: dict[str, Any]) -> None:
    """What decodes, and what only reads."""
    finished = run_main("plan", place.recipe(task={**place.task, **task}), "--measure")
    assert finished.code == 0, finished.err
    assert "measured on cpu:" in finished.out
    assert "hours of one evaluator on CPU" in " ".join(finished.out.split())
    assert not (place.path / "runs").exists()


def test_overrides_change_the_recipe(place: Place) -> None:
    finished = run_main("plan", place.recipe(), "sweep.k=[1]", "sweep.kind=[ffn]", "rank.by=[depth, random]")
    assert finished.code == 0, finished.err
    assert "2 trial" in finished.out


def test_sweep_ends_in_a_table_a_person_can_read(swept: Swept) -> None:
    out = swept.finished.out
    lines = [line.strip() for line in out.splitlines()]
    order = ("probe and rank", "evaluate", "confirm", "what", "target", "source", "all swapped", "lae ", "depth ", "winner: ")
    places = [next(place for place, line in enumerate(lines) if line.startswith(words)) for words in order]
    assert places == sorted(places)
    winner = swept.summary["winner"]
    assert f"winner: {winner['label']} (variant {winner['variant']}, {winner['num_modules']} modules), chosen on select" in out
    assert all(column in out for column in ("accuracy", "95 % CI", "TIR", "Recovery", "variant"))
    assert f"{winner['label']} *" in out
    assert swept.summary["mlflow_run"] in out


def test_show_prints_the_table_of_the_sweep_again(swept: Swept) -> None:
    finished = run_main("show", swept.folder)
    assert finished.code == 0, finished.err
    table = finished.out.strip()
    assert table in swept.finished.out


def test_show_all_has_every_row_of_every_split(swept: Swept) -> None:
    finished = run_main("show", swept.folder, "--all")
    results = swept.results
    assert finished.code == 0
    assert sum(line.rstrip().endswith(tuple(results["variant"])) for line in finished.out.splitlines()) == len(results)


def test_export_writes_beside_the_run_unless_told_otherwise(swept: Swept, tmp_path: Path) -> None:
    variant = swept.summary["winner"]["variant"]
    finished = run_main("export", swept.folder, "--variant", variant, "--out", tmp_path / "out")
    assert (finished.code, finished.out.strip()) == (0, f"wrote {tmp_path / 'out'}")
    assert weight_bytes(tmp_path / "out") == weight_bytes(swept.folder / "checkpoint")
    again = run_main("export", swept.folder, "--out", tmp_path / "out")
    assert again.code == 2
    assert "is there already" in again.err


def test_apply_and_undo_give_the_targets_bytes(swept: Swept, tmp_path: Path) -> None:
    target = swept.place.path / "target"
    done = run_main("apply", swept.folder / "delta", "--target", target, "--out", tmp_path / "made")
    undone = run_main("apply", swept.folder / "delta", "--target", tmp_path / "made", "--out", tmp_path / "back", "--undo")
    assert (done.code, undone.code) == (0, 0), done.err + undone.err
    assert weight_bytes(tmp_path / "made") == weight_bytes(swept.folder / "checkpoint")
    assert weight_bytes(tmp_path / "back") == weight_bytes(target)


def test_apply_refuses_a_checkpoint_that_is_not_the_deltas_target(swept: Swept, tmp_path: Path) -> None:
    finished = run_main("apply", swept.folder / "delta", "--target", swept.place.path / "source", "--out", tmp_path / "made")
    assert finished.code == 2
    assert "CheckpointError" in finished.err
    assert "differs from the target that this delta was made for" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_export_writes_a_recipe_for_mergekit(swept: Swept, tmp_path: Path) -> None:
    """Whose tensors are those of the checkpoint: tests/unit/graft/test_mergekit.py."""
    out = tmp_path / "winner.yaml"
    command = ("export", swept.folder, "--format", "mergekit", "--out", out)
    assert f"wrote {out}" in run_main(*command).out
    target, source = yaml.safe_load(out.read_text())["models"]
    assert target["model"] == str(swept.place.path / "target")
    taken = [entry["filter"] for entry in source["parameters"]["weight"] if entry.get("filter") and entry["value"] == 1]
    assert len(taken) == swept.summary["winner"]["num_modules"]
    again = run_main(*command)
    assert (again.code, "is there already" in again.err) == (2, True)
    unknown = run_main("export", swept.folder, "--format", "gguf")
    assert (unknown.code, "format 'gguf': expected one of checkpoint, mergekit" in unknown.err) == (2, True)


@pytest.mark.parametrize("command", ["show", "export"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    finished = run_main(command, tmp_path / "nothing")
    assert finished.code == 2
    assert "RunError" in finished.err
    assert "Run the sweep again" in finished.err
    assert not (tmp_path / "nothing").exists()
