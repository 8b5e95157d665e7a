"""From a sweep to its verdict through the real Ray and MLflow: what is recorded is what the outcomes say, counted by hand."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
from integration.helpers import SPLIT, Place, Swept, run_main
from mlflow import MlflowClient

from transplant_ray.evaluate.significance import mcnemar
from transplant_ray.evaluate.verdict import Conclusion

RANKERS = ["attribution", "channel", "reverse:lae", "weight_delta"]
GAP: tuple[Conclusion, ...] = ("no gap to close",)


def run(place: Place, name: str, **sweep: Any) -> Swept:
    recipe = place.recipe(name=name, rank={"by": RANKERS}, sweep={"k": [2, 5], "kind": ["all"], **sweep})
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    return Swept(place.path / "runs" / name, place, finished)


@pytest.fixture(scope="module")
def armed(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    return run(template.copy(tmp_path_factory.mktemp("armed")), "armed", arms=19)


@pytest.fixture(scope="module")
def named(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    primary = {"by": "channel", "kind": "all", "k": 2}
    return run(template.copy(tmp_path_factory.mktemp("named")), "named", primary=primary)


def summary(swept: Swept) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((swept.folder / "summary.json").read_text())
    return content


def right(swept: Swept, split: str, variant: str) -> pd.Series:
    outcomes = pd.read_parquet(swept.folder / "outcomes" / f"{split}.parquet")
    mine = outcomes[outcomes["variant"] == variant].drop_duplicates("example").sort_values("example")
    assert len(mine) == SPLIT[split]
    series: pd.Series = mine["correct"]
    return series


@pytest.mark.slow
def test_the_verdict_is_in_summary_console_and_mlflow(armed: Swept) -> None:
    verdict = summary(armed)["verdict"]
    assert f"{verdict['conclusion']}: {verdict['sentence']}" in " ".join(armed.finished.out.split())
    client = MlflowClient(tracking_uri=armed.place.uri)
    tags = client.get_run(summary(armed)["mlflow_run"]).data.tags
    assert tags["verdict"] == verdict["conclusion"]
    assert verdict["sentence"] in tags["mlflow.note.content"]


@pytest.mark.slow
def test_gap_and_gain_are_counted_from_the_outcomes(armed: Swept) -> None:
    verdict = summary(armed)["verdict"]
    target = "44136fa355"  # the empty variant
    gap = mcnemar(*(right(armed, "select", name).to_numpy() for name in (target, "source")))
    assert (verdict["gap"]["gained"], verdict["gap"]["lost"], verdict["gap"]["n"]) == (gap.gained, gap.lost, SPLIT["select"])
    if verdict["conclusion"] not in GAP:
        gain = mcnemar(*(right(armed, "test", name).to_numpy() for name in (target, "exported")))
        assert (verdict["gain"]["gained"], verdict["gain"]["lost"]) == (gain.gained, gain.lost)


@pytest.mark.slow
def test_every_arm_answers_on_test(armed: Swept) -> None:
    arms = summary(armed)["verdict"]["arms"]
    assert arms["sets_each"] == len(RANKERS) * 2
    assert len(arms["scores_on_test"]) == 19
    outcomes = pd.read_parquet(armed.folder / "outcomes" / "test.parquet")
    counts = outcomes.drop_duplicates(["variant", "example"]).groupby("variant")["correct"].mean()
    assert set(arms["scores_on_test"]) <= set(counts)


@pytest.mark.slow
def test_a_primary_trial_wins_whatever_the_others_reach(named: Swept) -> None:
    found = summary(named)
    assert found["winner"]["label"] == found["verdict"]["primary"] == "channel all k=2"
    assert found["verdict"]["arms"]["sets_each"] == 1
    assert len(found["verdict"]["arms"]["scores_on_test"]) == 19
    assert "named beforehand" in named.finished.out
    winners = named.results[named.results["winner"]]
    assert set(winners["ranker"]) == {"channel"}


@pytest.mark.slow
def test_rankings_say_what_they_cost_and_how_far_they_agree(named: Swept) -> None:
    found = summary(named)["rankings"]
    assert set(found["by_ranker"]) == set(RANKERS)
    assert found["by_ranker"]["attribution"]["cost"]["backwards"] == 4
    assert found["by_ranker"]["reverse:lae"]["cost"]["decodings"] == 2
    assert all(numbers["cost"]["seconds"] > 0 for numbers in found["by_ranker"].values())
    assert found["by_ranker"]["attribution"]["stability"]["num_examples"] == SPLIT["probe"]
    assert found["by_ranker"]["weight_delta"]["stability"] is None
    assert len(found["agreement"]) == 6
    ranked = pd.read_parquet(named.folder / "rankings.parquet")
    assert set(ranked["ranker"]) == set(RANKERS)


@pytest.fixture(scope="module")
def shut(cluster: None, template: Place, tmp_path_factory: pytest.TempPathFactory) -> Swept:  # noqa: ARG001
    """The better model is the target."""
    place = template.copy(tmp_path_factory.mktemp("shut"))
    models = {role: {"model": str(place.path / other)} for role, other in (("source", "target"), ("target", "source"))}
    recipe = place.recipe(name="shut", sweep={"k": [2], "kind": ["all"], "arms": 19}, **models)
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    return Swept(place.path / "runs" / "shut", place, finished)


@pytest.mark.slow
def test_without_a_gap_the_test_split_stays_shut(shut: Swept) -> None:
    found = summary(shut)
    assert found["verdict"]["conclusion"] == "no gap to close"
    assert (found["test_opened"], found["verdict"]["arms"], found["baselines"]["test"]) == (0, None, {})
    assert not (shut.folder.parent / "test-splits.json").exists()
    assert set(shut.results["split"]) == {"select"}
    answered = pd.read_parquet(shut.folder / "outcomes" / "test.parquet")
    assert set(answered["variant"]) == {"source"}  # which answers all at once, while it is there; nobody looks
    assert "the test split was not opened" in shut.finished.out


@pytest.mark.slow
def test_without_a_gap_what_select_liked_best_is_exported_all_the_same(shut: Swept) -> None:
    won = summary(shut)["winner"]
    assert won["exported_agrees"] == {"n": SPLIT["select"], "equal": SPLIT["select"]}
    assert (shut.folder / "checkpoint" / "model.safetensors").exists()
    assert "It was not confirmed on test." in (shut.folder / "report.html").read_text()
