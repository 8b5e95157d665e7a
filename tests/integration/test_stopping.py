"""Screen and race: who is stopped, on what evidence, and that two runs of a recipe stop the same. `swept`, which stops nobody, is
the reference: what a variant answers does not depend on who else is in the race."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import pandas as pd
import pytest
from integration.helpers import SPLIT, Place, Swept, run_main, timeless

from transplant_ray.distributed import trials
from transplant_ray.evaluate.task import load_task
from transplant_ray.recipe import load_recipe

RUNGS = (10, 20)
STOPPING = {"k": [2, 6, 16], "kind": ["attn", "all"], "screen": {"keep": 0.7}, "race": {"rungs": list(RUNGS), "keep": 0.5}}

pytestmark = pytest.mark.slow  # one sweep for all of them


@dataclass(frozen=True)
class Raced:
    swept: Swept
    heard: list[dict[str, Any]]
    """What Tune was told, in order."""


@pytest.fixture(scope="module")
def raced(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Raced:  # noqa: ARG001
    place = template.copy(tmp_path_factory.mktemp("raced"))
    heard: list[dict[str, Any]] = []

    def hear(_self: object, *, result: dict[str, Any], **_info: object) -> None:
        heard.append(result)

    resources = {"evaluators": 2, "shard_size": 7, "batch_size": 50}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials._TrialListener, "on_trial_result", hear)
        finished = run_main("sweep", place.recipe(name="raced", sweep=STOPPING, resources=resources))
    assert finished.code == 0, finished.err
    return Raced(Swept(place.path / "runs" / "raced", place, finished), heard)


def select(swept: Swept) -> pd.DataFrame:
    results = swept.results
    return results[results["split"] == "select"].reset_index(drop=True)


def racers(swept: Swept) -> list[str]:
    """Variants of trials that no baseline or control shares."""
    rows = select(swept)
    others = set(rows[rows["role"] != "trial"]["variant"])
    return sorted(set(rows[rows["role"] == "trial"]["variant"]) - others)


def right_among_first(swept: Swept, n: int) -> dict[str, int]:
    """Variant → right answers among the first n select examples, from the outcomes of a sweep that stopped nobody."""
    task = load_task(load_recipe(swept.folder / "recipe.yaml").task)
    first = {example.id for example in task.select[:n]}
    outcomes = pd.read_parquet(swept.folder / "outcomes" / "select.parquet")
    counts: dict[str, int] = outcomes[outcomes["example"].isin(first)].groupby("variant")["correct"].sum().to_dict()
    return counts


def stopped_by_hand(swept: Swept, losses: dict[str, float]) -> dict[str, tuple[str, int]]:
    """Variant → why and after how many examples it is stopped, the slow way."""
    live = sorted(racers(swept), key=lambda variant: (losses[variant], variant))
    stopped = dict.fromkeys(live[ceil(0.7 * len(live)) :], ("screened", 0))
    live = live[: ceil(0.7 * len(live))]
    for rung in RUNGS:
        right = right_among_first(swept, rung)
        live.sort(key=lambda variant: (-right[variant], variant))
        stopped |= dict.fromkeys(live[ceil(len(live) / 2) :], ("raced", rung))
        live = live[: ceil(len(live) / 2)]
    return stopped


def test_those_are_stopped_who_read_or_answer_worse(raced: Raced, swept: Swept) -> None:
    rows = select(raced.swept)
    losses = dict(zip(rows["variant"], rows["loss"], strict=True))
    found = {row.variant: (row.stopped, row.n) for row in rows.itertuples() if isinstance(row.stopped, str)}
    assert found == stopped_by_hand(swept, losses)
    assert {why for why, _ in found.values()} == {"screened", "raced"}
    assert raced.swept.summary["stopped"] == rows["stopped"].dropna().value_counts().to_dict()


def test_a_stopped_variant_keeps_what_it_has_and_the_others_answer_everything(raced: Raced, swept: Swept) -> None:
    for row in select(raced.swept).itertuples():
        if row.stopped == "screened":
            assert row.n == 0
            assert pd.isna(row.accuracy)
        elif row.role != "source":
            assert row.n == (row.n if row.stopped == "raced" else SPLIT["select"])
            assert row.correct == right_among_first(swept, row.n)[row.variant]
    assert set(select(raced.swept).query("role != 'trial'")["n"]) == {SPLIT["select"]}


def test_metrics_of_a_stopped_variant_are_against_baselines_on_the_same_examples(raced: Raced, swept: Swept) -> None:
    stopped = select(raced.swept).query("stopped == 'raced'")
    assert len(stopped)
    for row in stopped.itertuples():
        right = right_among_first(swept, row.n)
        target = right[select(swept).query("role == 'target'")["variant"].item()]
        assert row.tir == pytest.approx(row.correct / target)


def test_every_variant_has_its_loss_and_the_source_has_none(raced: Raced) -> None:
    rows = select(raced.swept)
    assert rows[rows["role"] != "source"]["loss"].notna().all()
    assert rows[rows["role"] == "source"]["loss"].isna().all()
    by_variant = rows.dropna(subset="loss").groupby("variant")["loss"]
    assert (by_variant.nunique() == 1).all()


def test_the_winner_ran_on_everything(raced: Raced) -> None:
    (winner,) = select(raced.swept).query("winner").itertuples()
    assert winner.n == SPLIT["select"]
    assert pd.isna(winner.stopped)


def test_trials_tell_tune_at_every_rung(raced: Raced) -> None:
    told: dict[str, list[tuple[int, bool]]] = {}
    for result in raced.heard:
        told.setdefault(result["config"]["point"]["label"], []).append((result["n"], result["last"]))
    rungs = {"raced": RUNGS, "screened": (0,)}
    trials_ended = select(raced.swept).query("role == 'trial'")
    assert len(told) == len(trials_ended)
    for row in trials_ended.itertuples():
        numbers = [n for n in rungs.get(row.stopped, (*RUNGS, SPLIT["select"])) if n <= row.n]
        label = f"{row.ranker} {row.kind} k={row.k:.0f}"
        assert told[label] == [(n, n == row.n) for n in numbers]


def test_another_run_with_other_shards_and_one_evaluator_stops_the_same(raced: Raced, place: Place) -> None:
    finished = run_main("sweep", place.recipe(name="raced", sweep=STOPPING, resources={"evaluators": 1, "shard_size": 40}))
    assert finished.code == 0, finished.err
    again = Swept(place.path / "runs" / "raced", place, finished)
    ours, theirs = (timeless(run.results).drop(columns="loss") for run in (again, raced.swept))
    pd.testing.assert_frame_equal(ours, theirs)
    assert select(again)["loss"].to_numpy() == pytest.approx(select(raced.swept)["loss"].to_numpy(), rel=1e-5, nan_ok=True)


def test_the_table_says_who_was_stopped(raced: Raced) -> None:
    out = raced.swept.finished.out
    assert "(raced," in out  # a long label goes on in the next line
    assert "n=10)" in out
    assert "screened" in out
    assert "loss" in out
