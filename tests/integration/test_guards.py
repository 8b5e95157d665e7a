"""Guards, channels and the objective through the real Ray and MLflow: every number again from the outcomes, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from integration.helpers import SPLIT, Place, Swept, plain_completion, run_main
from mlflow import MlflowClient
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from transplant_ray.evaluate.significance import mcnemar
from transplant_ray.graft.variant import Variant, blend, read_variant
from transplant_ray.tables import read_rows

TARGET = "44136fa355"
GUARD_SPLIT = {"probe": 5, "select": 20, "test": 25, "seed": 1}
PRICE = 0.5


def write_guard(path: Path, place: Place, word: str) -> dict[str, Any]:
    """What the target says to other prompts: it is always right there."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place.path / "target"), tiny_tokenizer()
    rows: list[dict[str, str]] = []
    for number in range(200):
        prompt = f"{word} {number}="
        answer = plain_completion(model, tokenizer, prompt).strip()
        if answer and len(rows) < 50:
            rows.append({"prompt": prompt, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**place.task, "data": str(path), "split": GUARD_SPLIT, "margin": 0.1}


@pytest.fixture(scope="module")
def guarded(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    place = template.copy(tmp_path_factory.mktemp("guarded"))
    tasks = {word: write_guard(place.path / f"{word}.jsonl", place, word) for word in ("one", "two")}
    recipe = place.recipe(
        name="guarded",
        guards={"tasks": tasks, "text": {"tokens": 16, "split": {"probe": 3, "select": 4, "test": 5}}},
        rank={"by": ["attribution"]},
        search={"gates": {"steps": 12, "penalty": [0, 1]}, "greedy": {"penalty": [0.5]}},
        sweep={"k": [2, 5], "kind": ["all"], "channels": [0.5], "arms": 19, "objective": {"price": PRICE}},
    )
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    return Swept(place.path / "runs" / "guarded", place, finished)


def outcomes(swept: Swept, name: str) -> pd.DataFrame:
    return pd.read_parquet(swept.folder / "outcomes" / f"{name}.parquet")


def accuracy(swept: Swept, name: str, variant: str) -> float:
    found = outcomes(swept, name)
    return float(found[found["variant"] == variant].drop_duplicates("example")["correct"].mean())


def found(swept: Swept) -> list[dict[str, Any]]:
    """What the searches came upon, the target itself aside."""
    return [result for results in swept.summary["searches"].values() for result in results if result["num_modules"]]


def test_what_a_search_finds_is_a_trial_like_any_other(guarded: Swept) -> None:
    results = guarded.results
    trials = results[(results["split"] == "select") & (results["role"] == "trial")].set_index("variant")
    assert [result["penalty"] for result in guarded.summary["searches"]["gates"]] == [0, 1]
    assert found(guarded)
    variants = read_rows(guarded.folder / "variants.parquet")
    for result in found(guarded):
        row = trials.loc[[result["variant"]]].query("ranker in ['gates row', 'greedy']").iloc[0]
        assert pd.isna(row["k"])
        assert (row["penalty"], row["num_modules"], row["n"]) == (result["penalty"], result["num_modules"], SPLIT["select"])
        coefficients = read_variant(variants, result["variant"]).coefficients
        assert {c for each in coefficients.values() for c in (each if isinstance(each, tuple) else (each,))} <= {0.0, 1.0}
        shares = [sum(c) / len(c) if isinstance(c, tuple) else c for c in coefficients.values()]
        assert row["size"] == pytest.approx(sum(shares))
        assert result["num_coefficients"] > 0


def test_nobody_is_asked_twice(guarded: Swept) -> None:
    for path in (guarded.folder / "outcomes").iterdir():
        assert not pd.read_parquet(path).duplicated(["variant", "example"]).any(), path.name


def test_every_variant_answers_every_guard_on_select(guarded: Swept) -> None:
    results = guarded.results
    select = results[results["split"] == "select"]
    guards = pd.read_parquet(guarded.folder / "guards.parquet")
    mine = guards[guards["split"] == "select"]
    assert set(mine["variant"]) == set(select["variant"])
    assert set(mine["n"]) == {GUARD_SPLIT["select"]}
    assert mine[mine["variant"] == TARGET]["accuracy"].eq(1).all()
    for row in mine.itertuples():
        assert row.accuracy == accuracy(guarded, f"guard-{row.guard}-select", row.variant)
        assert row.share == pytest.approx(row.accuracy)
    assert dict(mine.groupby("guard")["held_out"].all()) == {"one": False, "two": True}


def test_the_worth_of_a_trial_is_its_accuracy_less_the_price_of_what_the_first_guard_lost(guarded: Swept) -> None:
    results = guarded.results
    trials = results[(results["split"] == "select") & (results["role"] == "trial")]
    assert len(trials) == 4 + len(found(guarded))
    for row in trials.itertuples():
        lost = max(0.0, 1 - accuracy(guarded, "guard-one-select", row.variant))
        assert row.worth == pytest.approx(row.accuracy - PRICE * lost)
    (winner,) = trials[trials["winner"]].itertuples()
    best = trials.loc[trials["worth"].idxmax()]
    close = trials[trials["worth"] >= best["worth"] - best["worth_error"]]
    assert winner.size == close["size"].min()


def test_the_guards_of_the_verdict_are_of_the_exported_checkpoint(guarded: Swept) -> None:
    verdict = guarded.summary["verdict"]
    if verdict["gain"] is None:
        pytest.skip("no gap: nothing was judged")
    found = {guard["name"]: guard for guard in verdict["guards"]}
    assert {name: guard["held_out"] for name, guard in found.items()} == {"one": False, "two": True}
    for name, guard in found.items():
        after = accuracy(guarded, f"guard-{name}-test", "exported")
        assert guard["pairs"]["n"] == GUARD_SPLIT["test"]
        assert (guard["pairs"]["both"] + guard["pairs"]["gained"]) / GUARD_SPLIT["test"] == pytest.approx(after)
        assert guard["margin"] == 0.1


def test_arms_answer_the_guard_that_the_winner_was_chosen_by_and_no_other(guarded: Swept) -> None:
    planned = set(guarded.results["variant"]) | {"source"}
    answered = {name: set(outcomes(guarded, f"guard-{name}-select")["variant"]) - planned for name in ("one", "two")}
    assert len(answered["one"]) >= 19
    assert not answered["two"]


def test_divergence_is_0_at_the_target_and_grows_with_what_is_swapped(guarded: Swept) -> None:
    select = guarded.results[guarded.results["split"] == "select"].set_index("role")
    assert select.loc["target", "kl"] == pytest.approx(0, abs=1e-6)
    assert select.loc["all", "kl"] > select.loc[["trial"], "kl"].min() > 0
    assert pd.isna(select.loc["source", "kl"])


def test_a_trial_by_channel_can_be_exported_and_is_what_was_measured(guarded: Swept) -> None:
    results = guarded.results
    row = next(results[results["channels"].notna() & (results["role"] == "trial")].itertuples())
    out = guarded.place.path / "by-channel"
    finished = run_main("export", guarded.folder, "--variant", row.variant, "--out", out)
    assert finished.code == 0, finished.err
    variant: Variant = read_variant(read_rows(guarded.folder / "variants.parquet"), row.variant)
    folders = (guarded.place.path / "target", guarded.place.path / "source", out)
    target, source, made = (load_file(folder / "model.safetensors") for folder in folders)
    for name, coefficients in variant.coefficients.items():
        assert set(coefficients if isinstance(coefficients, tuple) else ()) == {0.0, 1.0}
        expected = blend(target[f"{name}.weight"], source[f"{name}.weight"], coefficients)
        assert torch.equal(made[f"{name}.weight"], expected)
    model = AutoModelForCausalLM.from_pretrained(out)
    said = outcomes(guarded, "select")
    said = said[said["variant"] == row.variant].drop_duplicates("example").head(5)
    prompts = pd.read_parquet(guarded.folder / "examples.parquet").set_index("example")["prompt"]
    assert [plain_completion(model, tiny_tokenizer(), prompts[e]) for e in said["example"]] == list(said["completion"])


def test_the_merge_that_moves_as_much_as_the_winner_is_held_against_it(guarded: Swept) -> None:
    results = guarded.results
    (winner,) = results[results["winner"] & (results["split"] == "select")].itertuples()
    matched = guarded.summary["winner"]["matched"]
    rows = results[(results["ranker"] == "uniform") & (results["alpha"] == round(winner.moved, 4))]
    assert set(rows["split"]) == {"select", "test"}
    assert rows["moved"].sub(winner.moved).abs().max() < 1e-4
    (test,) = rows[rows["split"] == "test"].itertuples()
    assert matched["test"]["accuracy"] == test.accuracy == accuracy(guarded, "test", test.variant)
    ours, theirs = (right_on_test(guarded, name) for name in ("exported", test.variant))
    assert matched["p"] == pytest.approx(mcnemar(theirs, ours).p)
    assert matched["label"] in guarded.finished.out


def right_on_test(swept: Swept, variant: str) -> Any:
    found = outcomes(swept, "test")
    return found[found["variant"] == variant].drop_duplicates("example").sort_values("example")["correct"].to_numpy()


def test_console_and_mlflow_tell_the_price(guarded: Swept) -> None:
    assert "price: KL on general text" in guarded.finished.out
    assert "two (held out)" in guarded.finished.out
    client = MlflowClient(tracking_uri=guarded.place.uri)
    run = client.get_run(guarded.summary["mlflow_run"])
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert len(children) == 4 + len(found(guarded))
    assert all({"kl", "guard_share", "worth"} <= child.data.metrics.keys() for child in children)


def test_prompts_and_answers_are_kept_for_those_who_read_completions(guarded: Swept) -> None:
    examples = pd.read_parquet(guarded.folder / "examples.parquet")
    sizes = examples.groupby(["task", "split"]).size().to_dict()
    assert sizes == {
        **{("task", split): SPLIT[split] for split in ("probe", "select", "test")},
        **{(guard, split): GUARD_SPLIT[split] for guard in ("one", "two") for split in ("probe", "select", "test")},
    }


@pytest.mark.slow
def test_how_often_test_was_opened_is_counted_over_the_runs_of_a_storage(guarded: Swept) -> None:
    assert guarded.summary["test_opened"] == 1
    again = run_main("sweep", guarded.place.path / "recipe.yaml", "name=again", "guards={text: null}", "sweep={k: [2]}")
    assert again.code == 0, again.err
    summary = json.loads((guarded.folder.parent / "again" / "summary.json").read_text())
    assert summary["test_opened"] == 2
    assert guarded.summary["guard_tests_opened"] == {"one": 1, "two": 1}
    assert "these test examples were opened 2 times under this storage" in again.out
