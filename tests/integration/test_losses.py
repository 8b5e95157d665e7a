"""A task and a guard whose scorer is `loss`, through the real Ray and MLflow: every number again by plain `transformers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from integration.helpers import SPLIT, Place, Swept, run_main
from mlflow import MlflowClient
from scipy.stats import ttest_rel
from tiny import EOS, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TARGET = "44136fa355"
GUARD_SPLIT = {"probe": 5, "select": 20, "test": 25, "seed": 1}


@pytest.fixture(scope="module")
def losses(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    place = template.copy(tmp_path_factory.mktemp("losses"))
    task = {key: value for key, value in place.task.items() if key != "max_new_tokens"} | {"scorer": "loss"}
    texts = place.path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a text of number {n} and {n * n}"}) + "\n" for n in range(50)))
    guard = {"data": str(texts), "prompt": "", "answer": "{text}", "scorer": "loss", "split": GUARD_SPLIT, "margin": 0.5}
    recipe = place.recipe(
        name="losses",
        task=task,
        guards={"tasks": {"texts": guard}, "text": None, "held_out": "texts"},
        rank={"by": ["attribution"]},
        sweep={"k": [2, 5], "kind": ["all"], "race": {"rungs": [10]}, "arms": 19},
    )
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    return Swept(place.path / "runs" / "losses", place, finished)


@torch.inference_mode()
def plain_loss(folder: Path, asked: pd.DataFrame) -> float:
    """Mean over the examples of the mean over their tokens, one row at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()
    found = []
    for prompt, answer in zip(asked["prompt"], asked["answer"], strict=True):
        before = tokenizer("" if prompt == answer else prompt)["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]
        logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
        found.append(float(cross_entropy(logits, torch.tensor(after))))
    return sum(found) / len(found)


def asked(swept: Swept, task: str, split: str) -> pd.DataFrame:
    rows = pd.read_parquet(swept.folder / "examples.parquet")
    return rows[(rows["task"] == task) & (rows["split"] == split)]


@pytest.mark.parametrize(("role", "split"), [("target", "select"), ("source", "select"), ("target", "test"), ("source", "test")])
def test_losses_are_those_of_plain_transformers(losses: Swept, role: str, split: str) -> None:
    row = losses.results.query("role == @role and split == @split").iloc[0]
    assert row["loss"] == pytest.approx(plain_loss(losses.place.path / role, asked(losses, "task", split)), rel=1e-4)
    assert row["ci_low"] < row["loss"] < row["ci_high"]
    assert pd.isna(row["accuracy"])


def test_beside_an_accuracy_the_loss_is_measured_too(swept: Swept) -> None:
    rows = swept.results.query("split == 'select' and role != 'source'")
    assert rows["loss"].notna().all()
    (target,) = rows[rows["role"] == "target"].itertuples()
    assert target.loss == pytest.approx(plain_loss(swept.place.path / "target", asked(swept, "task", "select")), rel=1e-4)


def test_the_winner_is_measured_on_its_checkpoint(losses: Swept) -> None:
    row = losses.results.query("winner and split == 'test'").iloc[0]
    checkpoint = losses.folder / "checkpoint"
    assert row["loss"] == pytest.approx(plain_loss(checkpoint, asked(losses, "task", "test")), rel=1e-4)
    guard = pd.read_parquet(losses.folder / "guards.parquet").query("winner and split == 'test'").iloc[0]
    assert guard["loss"] == pytest.approx(plain_loss(checkpoint, asked(losses, "texts", "test")), rel=1e-4)


def test_the_winner_is_the_smallest_within_a_standard_error_of_the_best(losses: Swept) -> None:
    trials = losses.results.query("role == 'trial' and split == 'select' and stopped.isna()")
    best = trials.loc[trials["loss"].idxmin()]
    close = trials[trials["loss"] <= best["loss"] + best["worth_error"]]
    assert trials[trials["winner"]].iloc[0]["k"] == close["k"].min()
    assert set(losses.results.query("role == 'trial' and split == 'select' and stopped == 'raced'")["n"]) == {10}


def per_example(swept: Swept, split: str, variants: Sequence[str]) -> list[pd.Series]:
    said = pd.read_parquet(swept.folder / "outcomes" / f"{split}.parquet").drop_duplicates(["variant", "example"])
    table = said.pivot_table(index="example", columns="variant", values="loss")
    return [table[variant] for variant in variants]


def test_the_verdict_is_by_the_paired_t_test(losses: Swept) -> None:
    verdict = losses.summary["verdict"]
    target, source = per_example(losses, "select", (TARGET, "source"))
    assert len(target) == SPLIT["select"]
    assert verdict["gap"]["p_better"] == pytest.approx(ttest_rel(target, source, alternative="greater").pvalue, rel=1e-9)
    if verdict["gain"] is not None:
        before, after = per_example(losses, "test", (TARGET, "exported"))
        assert verdict["gain"]["p"] == pytest.approx(ttest_rel(before, after).pvalue, rel=1e-9)


def test_mlflow_and_the_report_have_losses(losses: Swept) -> None:
    client = MlflowClient(losses.place.uri)
    run = client.get_run(losses.summary["mlflow_run"])
    trials = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert trials
    assert all("loss" in run.data.metrics and "accuracy" not in run.data.metrics for run in trials)
    report = (losses.folder / "report.html").read_text(encoding="utf-8")
    assert "nats a token" in report
    assert "McNemar" not in report
