"""Merging baselines through the real Ray, and the real mergekit where it is: a row says what the merged checkpoint itself says."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from integration.helpers import SPLIT, Place, Swept, plain_completion, run_main
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from transplant_ray.evaluate.task import load_task
from transplant_ray.graft.mergekit import PLACE, find_mergekit
from transplant_ray.graft.merges import MASK_SEED
from transplant_ray.pipeline import job
from transplant_ray.recipe import load_recipe

TOO_FAR = 1e39
"""A λ at which weights overflow: the merge cannot be loaded."""
BY_MERGEKIT = ("dare_ties",)


def sweep_of(*merges: str, **controls: object) -> dict[str, object]:
    return {"k": [2], "kind": ["all"], "controls": {"merges": list(merges), **controls}}


@pytest.fixture(scope="module")
def based(template: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The pair with a base that is neither of them."""
    place = template.copy(tmp_path_factory.mktemp("based"))
    save_tiny(place.path / "base", seed=3)
    return place


@pytest.fixture(scope="module")
def merged(cluster: None, based: Place) -> Swept:  # noqa: ARG001
    merges = ("task_arithmetic", *(BY_MERGEKIT if find_mergekit() else ()))
    density = {"density": 0.9} if find_mergekit() else {}
    recipe = based.recipe(name="merged", base={"model": "./base"}, sweep=sweep_of(*merges, scales=[0.5, TOO_FAR], **density))
    return Swept(based.path / "runs" / "merged", based, run_main("sweep", recipe))


def rows_of(swept: Swept, merge: str) -> pd.DataFrame:
    rows = swept.results
    return rows[rows["ranker"] == merge].set_index("alpha")


def by_hand(place: Place, scale: float) -> PreTrainedModel:
    """base + λ·((target − base) + (source − base)), over the parameters of loaded models."""
    base, target, source = (AutoModelForCausalLM.from_pretrained(place.path / name) for name in ("base", "target", "source"))
    with torch.no_grad():
        for start, ours, theirs in zip(base.parameters(), target.parameters(), source.parameters(), strict=True):
            start.copy_(start + scale * ((ours - start) + (theirs - start)))
    model: PreTrainedModel = base.eval()
    return model


@pytest.mark.slow
def test_a_merge_says_what_its_weights_say(merged: Swept) -> None:
    row = rows_of(merged, "task_arithmetic").loc[0.5]
    assert (row["role"], row["kind"], row["split"], row["n"]) == ("control", "all", "select", SPLIT["select"])
    assert pd.isna(row["error"])
    model = by_hand(merged.place, 0.5)
    assert row["num_parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    outcomes = pd.read_parquet(merged.folder / "outcomes" / "select.parquet")
    said = outcomes[outcomes["variant"] == row["variant"]].set_index("example")
    assert row["correct"] == said["correct"].sum()
    differing = 0
    for example in load_task(load_recipe(merged.folder / "recipe.yaml").task).select:
        alone = plain_completion(model, tiny_tokenizer(), example.prompt)
        differing += said.loc[example.id, "completion"] != alone and said.loc[example.id, "num_close"] == 0
    assert differing == 0


@pytest.mark.slow
def test_a_merge_that_fails_is_a_row_with_its_reason(merged: Swept) -> None:
    row = rows_of(merged, "task_arithmetic").loc[TOO_FAR]
    assert row["error"].startswith("NumericsError: ")
    assert "NaN or infinite values" in row["error"]
    assert pd.isna(row["accuracy"])
    assert merged.finished.code == 1
    assert {failed["label"] for failed in merged.summary["failed"]} >= {"task_arithmetic all alpha=1e+39"}


@pytest.mark.slow
def test_a_merge_never_wins_and_changes_no_other_row(merged: Swept, swept: Swept) -> None:
    assert merged.summary["winner"]["label"] == "lae all k=2"
    mine, theirs = (s.results[s.results["split"] == "select"] for s in (merged, swept))
    for role in ("target", "source", "all"):
        assert mine[mine["role"] == role]["correct"].item() == theirs[theirs["role"] == role]["correct"].item()


@pytest.mark.slow
def test_nothing_of_a_merge_stays_but_its_row_and_recipe(merged: Swept) -> None:
    assert not list(merged.folder.glob(".merge-*"))
    made = {path.name for path in merged.folder.rglob("*.yaml")} - {"recipe.yaml"}
    assert made == {f"{merge}-{scale}.yaml" for merge in BY_MERGEKIT for scale in ("0.5", "1e+39") if find_mergekit()}


@pytest.mark.parametrize("merge", BY_MERGEKIT)
@pytest.mark.slow
def test_mergekits_merges_are_rows_too(merged: Swept, merge: str) -> None:
    if find_mergekit() is None:
        pytest.skip("no mergekit-yaml: `make mergekit`")
    rows = rows_of(merged, merge)
    assert rows.loc[0.5, "n"] == SPLIT["select"]
    assert pd.isna(rows.loc[0.5, "error"])
    assert rows.loc[0.5, "seed"] == MASK_SEED
    assert rows.loc[TOO_FAR, "error"].startswith("NumericsError: ")
    kept = yaml.safe_load((merged.folder / "merges" / f"{merge}-0.5.yaml").read_text())
    assert kept["base_model"] == str(merged.place.path / "base")
    assert kept["parameters"] == {"lambda": 0.5}
    assert [(model["model"], model["parameters"]) for model in kept["models"]] == [
        (str(merged.place.path / role), {"weight": 1.0, "density": 0.9}) for role in ("target", "source")
    ]


def test_merges_are_in_the_plan(based: Place) -> None:
    finished = run_main("plan", based.recipe(base={"model": "./base"}, sweep=sweep_of("task_arithmetic")))
    assert finished.code == 0
    cost = f"each a checkpoint to make and load, and {SPLIT['select']} answers more"
    assert f"merges: task_arithmetic all alpha=0.5, task_arithmetic all; {cost}" in " ".join(finished.out.split())


def test_without_mergekit_its_merges_are_refused_before_anything_starts(based: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_mergekit", lambda: None)
    finished = run_main("sweep", based.recipe(name="refused", base={"model": "./base"}, sweep=sweep_of("ties", "task_arithmetic")))
    assert finished.code == 2
    assert "['ties'] are made by mergekit-yaml, which is not installed. `pip install mergekit==0.1.5`" in finished.err
    assert not (based.path / "runs" / "refused").exists()


def test_a_base_of_another_kind_is_refused(based: Place, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "gpt2", "gpt2")
    finished = run_main("plan", based.recipe(base={"model": str(base)}, sweep=sweep_of("task_arithmetic")))
    assert finished.code == 2
    assert "no compatible module between source" in finished.err


def test_a_mergekit_that_is_not_where_it_is_said_to_be(based: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, "/nowhere/mergekit-yaml")
    finished = run_main("plan", based.recipe(base={"model": "./base"}, sweep=sweep_of("dare_ties")))
    assert (finished.code, f"{PLACE}=/nowhere/mergekit-yaml: no such file" in finished.err) == (2, True)
