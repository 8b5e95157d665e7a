"""What a finished sweep has told: its log, and Ray's metrics as Prometheus would read them."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

import pandas as pd
import pytest
import ray
import requests
from integration.helpers import SPLIT, Swept

from transplant_ray.distributed.facts import AtWork, SweepBegins, SweepEnds
from transplant_ray.distributed.meters import Meters, count_in_evaluator
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.outcome import Outcome

PATIENCE = 90
"""Processes tell their metrics every ten seconds."""


@pytest.fixture(scope="module")
def log(swept: Swept) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (swept.folder / "log.jsonl").read_text().splitlines()]


def of(log: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [fact for fact in log if fact["event"] == event]


def test_every_outcome_is_in_the_log_with_who_answered_it(swept: Swept, log: list[dict[str, Any]]) -> None:
    """The shards of the log and the outcomes on disk are the same answers."""
    shards = of(log, "shard done")
    for split in ("select", "test"):
        outcomes = pd.read_parquet(swept.folder / "outcomes" / f"{split}.parquet").query("variant != 'exported'")
        mine = [fact for fact in shards if (fact["task"], fact["split"]) == ("task", split) and fact["variant"] != "exported"]
        counted = Counter[str]()
        for fact in mine:
            counted[fact["variant"]] += fact["examples"]
        assert counted == outcomes["variant"].value_counts().to_dict()
        assert sum(fact["tokens"] for fact in mine) == outcomes["num_tokens"].sum()
    evaluated = [fact for fact in shards if "evaluator" in fact]
    assert {fact["evaluator"] for fact in evaluated} == {fact["evaluator"] for fact in of(log, "evaluator joined")}
    assert len({fact["evaluator"] for fact in evaluated}) == 2
    assert all(ray.nodes()[0]["NodeID"].startswith(fact["node"]) for fact in evaluated)


def test_a_shard_has_one_name_for_all_variants(swept: Swept, log: list[dict[str, Any]]) -> None:
    asked = [f for f in of(log, "shard done") if "evaluator" in f and (f["task"], f["split"]) == ("task", "select")]
    of_each = {variant: {f["shard"] for f in asked if f["variant"] == variant} for variant in {f["variant"] for f in asked}}
    (names,) = {frozenset(names) for names in of_each.values()} - {frozenset[str]()}
    assert sorted(int(name.rpartition("+")[2]) for name in names) == [SPLIT["select"] % 15, 15, 15]
    assert swept.summary["winner"]["variant"] in of_each


def test_the_log_tells_the_sweep_from_its_beginning_to_its_end(swept: Swept, log: list[dict[str, Any]]) -> None:
    assert {(fact["run"], fact["recipe"]) for fact in log} == {("tiny", (swept.folder / ".identity").read_text())}
    attempts = {fact["attempt"] for fact in log}
    assert len(of(log, "sweep begins")) == len(attempts)
    assert {"event": "sweep ends", "exit": 0}.items() <= log[-1].items()
    stages = {fact["stage"] for fact in of(log, "stage ends")}
    assert swept.summary["seconds"].keys() | {"send to MLflow"} == stages  # the last comes when summary and report are written
    assert len(of(log, "trial reported")) == len(swept.results.query("role == 'trial' and split == 'select'"))
    (winner,) = of(log, "winner")
    assert (winner["trial"], winner["variant"]) == (swept.summary["winner"]["label"], swept.summary["winner"]["variant"])
    (asked,) = of(log, "variants asked")
    assert len({fact["variant"] for fact in of(log, "variant done")}) == asked["variants"]


def test_the_command_line_says_where_the_time_went(swept: Swept) -> None:
    assert re.search(r"^time: .*, of which .*evaluate", swept.finished.out, flags=re.MULTILINE)


def metrics() -> dict[str, float]:
    """Name and tags of every sample of ours, as this node offers them."""
    node = ray.nodes()[0]
    text = requests.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).text
    samples = (line.rpartition(" ") for line in text.splitlines() if line.startswith("ray_transplant_ray_"))
    return {name: float(value) for name, _, value in samples}


def total(samples: dict[str, float], name: str, **tags: str) -> float:
    wanted = [f'{tag}="{value}"' for tag, value in tags.items()]
    return sum(value for key, value in samples.items() if key.startswith(f"{name}{{") and all(tag in key for tag in wanted))


def test_prometheus_is_offered_what_was_counted(swept: Swept, log: list[dict[str, Any]]) -> None:  # noqa: ARG001
    """At least: other sweeps of this session have the same name."""
    shards = [fact for fact in of(log, "shard done") if (fact["task"], fact["split"]) == ("task", "select")]
    tags = {"run": "tiny", "task": "task", "split": "select"}
    expected = {
        "ray_transplant_ray_examples_total": sum(fact["examples"] for fact in shards),
        "ray_transplant_ray_tokens_total": sum(fact["tokens"] for fact in shards),
        "ray_transplant_ray_shards_total": len(shards),
        "ray_transplant_ray_shard_seconds_count": len(shards),
    }
    deadline = time.monotonic() + PATIENCE
    while any(total(metrics(), name, **tags) < value for name, value in expected.items()) and time.monotonic() < deadline:
        time.sleep(2)
    found = metrics()
    for name, value in expected.items():
        assert total(found, name, **tags) >= value > 0, name
    done = len(of(log, "variant done"))
    assert total(found, "ray_transplant_ray_variants_done_total", run="tiny") >= done


@pytest.mark.slow
def test_a_gauge_is_offered_for_as_long_as_the_sweep_goes_on(cluster: None) -> None:  # noqa: ARG001
    """Ray would forget it after 20 seconds."""
    running, tags = Meters("running"), {"run": "running"}
    running.hear(SweepBegins("sweep", "runs/running"))
    running.hear(AtWork(2, 3, 1.0))
    time.sleep(30)
    deadline = time.monotonic() + PATIENCE
    while not total(metrics(), "ray_transplant_ray_evaluators_at_work", **tags) and time.monotonic() < deadline:
        time.sleep(2)
    found = metrics()
    running.hear(SweepEnds(0, 30.0))
    names = ("evaluators_at_work", "evaluators", "gpus_at_work")
    assert [total(found, f"ray_transplant_ray_{name}", **tags) for name in names] == [2, 3, 1]


@ray.remote(num_cpus=0)
class Counting:
    """Counts as an evaluator does, and lives until it was seen."""

    def count(self) -> str:
        outcomes = tuple(Outcome("v", f"e{i}", "x", True, 7, True) for i in range(3))
        count_in_evaluator("counted", VariantShard("v", outcomes, 0.5))
        worker: str = ray.get_runtime_context().get_worker_id()
        return worker


def test_what_an_evaluator_counts_is_offered_under_its_worker(cluster: None) -> None:  # noqa: ARG001
    counting = Counting.remote()  # type: ignore[attr-defined] # what the decorator adds
    tags = {"run": "counted", "WorkerId": ray.get(counting.count.remote())}
    deadline = time.monotonic() + PATIENCE
    while not total(metrics(), "ray_transplant_ray_evaluator_tokens_total", **tags) and time.monotonic() < deadline:
        time.sleep(2)
    assert total(metrics(), "ray_transplant_ray_evaluator_tokens_total", **tags) == 21
    assert total(metrics(), "ray_transplant_ray_evaluator_examples_total", **tags) == 3
    ray.kill(counting)
