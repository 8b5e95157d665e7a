"""What a node finds wrong with itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from transplant_ray.distributed import preflight
from transplant_ray.distributed.actors import Workload
from transplant_ray.distributed.organ_trials import Trials, _unfit
from transplant_ray.distributed.preflight import COMPARED, DRIVER, Needs, check_node, look, make_needs, samples_of
from transplant_ray.errors import CheckpointError, ResourceError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.manifest import WEIGHTS
from transplant_ray.recipe import TrackingSpec
from transplant_ray.shelf import Shelf
from transplant_ray.versions import CODE, versions

TOKEN = ".preflight-x"


@pytest.fixture
def needs(tmp_path: Path) -> Needs:
    tiny_model("llama", 1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    shelf = Shelf(str(tmp_path / "runs"))
    shelf.write(f"{TOKEN}/{DRIVER}", TOKEN.encode())
    model = open_checkpoint(str(tmp_path / "model"))
    organ = open_organ(extract_organ(model, "0", tmp_path / "organ"))
    return Needs({"source": model}, ("exact", "math"), shelf, None, versions(COMPARED), organs={"organs.a": organ})


def test_a_node_like_the_driver_has_no_problem_and_leaves_a_word_in_the_storage(needs: Needs) -> None:
    needs = replace(needs, samples=samples_of(needs.checkpoints.values()))
    assert needs.samples
    assert look(needs, TOKEN) == preflight.Seen((), ())
    assert len(list((Path(needs.shelf.place) / TOKEN).iterdir())) == 2


@pytest.mark.parametrize(("drivers", "nodes"), [("2.13.0+cpu", "2.13.0"), ("2.13.0", "2.13.0+cu130")])
def test_another_build_of_the_same_version_is_no_other_version(
    needs: Needs, monkeypatch: pytest.MonkeyPatch, drivers: str, nodes: str
) -> None:
    """The image of a head without GPUs has torch for CPUs."""
    monkeypatch.setattr(preflight, "versions", lambda _names: {"torch": nodes})
    assert not look(replace(needs, versions={"torch": drivers})).problems
    (problem,) = look(replace(needs, versions={"torch": "2.12.0+cpu"})).problems
    assert f"torch {nodes} (the driver has 2.12.0+cpu)" in problem


def lose_the_model(needs: Needs) -> Needs:
    shutil.rmtree(str(needs.checkpoints["source"].folder))
    return needs


def give_another_model(needs: Needs) -> Needs:
    tiny_model("gpt2", 1).save_pretrained(str(needs.checkpoints["source"].folder))
    return needs


def lose_the_organ(needs: Needs) -> Needs:
    shutil.rmtree(str(needs.organs["organs.a"].checkpoint.folder))
    return needs


def lose_its_weights(needs: Needs) -> Needs:
    (Path(str(needs.organs["organs.a"].checkpoint.folder)) / WEIGHTS).unlink()
    return needs


def give_another_organ(needs: Needs) -> Needs:
    organ = needs.organs["organs.a"]
    shutil.rmtree(str(organ.checkpoint.folder))
    extract_organ(needs.checkpoints["source"], "1", Path(str(organ.checkpoint.folder)))
    return needs


def leave_it_out_of_date(needs: Needs) -> Needs:
    """A private copy of the same shapes, as it was before the last training."""
    told = replace(needs, samples=samples_of(needs.checkpoints.values()))
    tiny_model("llama", 2).save_pretrained(str(needs.checkpoints["source"].folder))
    return told


def share_nothing(needs: Needs) -> Needs:
    return replace(needs, shelf=Shelf(f"{needs.shelf.place}-elsewhere"))


def read_only_leftovers(needs: Needs) -> Needs:
    (Path(needs.shelf.place) / TOKEN / DRIVER).write_text("of another run")
    return needs


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lose_the_model, r"CheckpointError: .*model: no such folder"),
        (give_another_model, r"`source` .*other tensors than the driver sees\. Copy it again"),
        (lose_the_organ, r"OrganError: .*organ.json: not the manifest of an organ"),
        (lose_its_weights, r"CheckpointError: .*organ.safetensors"),
        (give_another_organ, r"OrganError: `organs.a` .*organ: another organ than the driver sees\. Copy it again, or share"),
        (leave_it_out_of_date, r"CheckpointError: .*model: not the bytes that the driver sees there\. Copy it again"),
        (share_nothing, r"`storage`: .*runs-elsewhere is not what the driver sees there\. Use a place that all nodes share"),
        (read_only_leftovers, r"`storage`: .*is not what the driver sees there"),
        (lambda needs: replace(needs, versions={"torch": "0.1"}), r"other versions: torch \S+ \(the driver has 0\.1\)\. Install"),
        (
            lambda needs: replace(needs, versions={CODE: "0af1"}),
            r"other versions: transplant-ray's code \w+ \(the driver has 0af1\)",
        ),
    ],
)
def test_what_a_node_cannot_do_is_said(needs: Needs, spoil: Callable[[Needs], Needs], found: str) -> None:
    (problem,) = look(spoil(needs), TOKEN).problems
    assert re.search(found, problem), problem


@pytest.mark.parametrize(
    ("hardware", "seen_by_torch", "problem", "warning"),
    [
        (True, 2, None, None),
        (True, 1, "Ray promises 2 GPUs and torch sees 1. Check", None),
        (False, 0, None, "Ray promises 2 GPUs and there are none"),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_problem_and_gpus_that_are_not_there_a_warning(
    needs: Needs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hardware: bool, seen_by_torch: int, problem: Any, warning: Any
) -> None:
    monkeypatch.setattr(preflight, "HARDWARE", (tmp_path if hardware else tmp_path / "nothing",))
    monkeypatch.setattr(preflight, "_num_gpus_of_torch", lambda: seen_by_torch)
    seen = look(replace(needs, num_gpus=2))
    assert [text.startswith(problem) for text in seen.problems] == ([True] if problem else [])
    assert [text.startswith(warning) for text in seen.warnings] == ([True] if warning else [])


def test_what_every_verb_needs_is_asked_in_one_way(needs: Needs) -> None:
    for uri, asked in (("http://mlflow:5000", "http://mlflow:5000"), ("sqlite:///mlflow.db", None)):
        made = make_needs({}, needs.shelf, TrackingSpec(uri=uri), scorers=["math", "loss", "math"], libraries=["peft"])
        assert (made.tracking, made.scorers, made.organs) == (asked, ("loss", "math"), {})
        assert made.versions == versions((*COMPARED, "peft"))
    assert make_needs(needs.checkpoints, needs.shelf, TrackingSpec()).samples == samples_of(needs.checkpoints.values())


def test_an_actor_on_a_node_that_came_later_looks_for_itself(needs: Needs) -> None:
    """The nodes of the start were looked at; whoever comes after that would write outcomes under the driver's name."""
    checkpoint = needs.checkpoints["source"]
    workload = Workload(checkpoint, "float32", 0, 1, versions=needs.versions, samples=samples_of([checkpoint]))
    workload.check_node(checkpoint, checkpoint)
    told = replace(needs, samples=samples_of([checkpoint]))
    looks_at = told.versions, told.samples, told.checkpoints.values()
    check_node(*looks_at)
    with pytest.raises(ResourceError, match=r"other versions: torch \S+ \(the driver has 0\.1\)"):
        replace(workload, versions={"torch": "0.1"}).check_node(checkpoint)
    leave_it_out_of_date(needs)
    for looks in (lambda: workload.check_node(checkpoint), lambda: check_node(*looks_at)):
        with pytest.raises(CheckpointError, match="not the bytes that the driver sees"):
            looks()


def test_a_process_of_an_organ_sweep_on_such_a_node_says_so_of_its_models(needs: Needs) -> None:
    recipient = needs.checkpoints["source"]
    workload = Workload(recipient, "float32", 0, 1, versions=needs.versions, samples=samples_of([recipient]))
    assert _unfit(Trials({}, {}, workload)) is None
    unfit = _unfit(Trials({}, {}, replace(workload, versions={"torch": "0.1"})))
    assert unfit is not None
    assert unfit.startswith("UnfitNode: other versions: torch")


def test_a_tracking_server_that_a_node_does_not_reach_is_a_warning(needs: Needs) -> None:
    seen = look(replace(needs, tracking="http://user:secret@127.0.0.1:9"))
    assert not seen.problems
    (warning,) = seen.warnings
    assert "does not reach `tracking.uri` http://127.0.0.1:9" in warning
    assert "secret" not in warning
