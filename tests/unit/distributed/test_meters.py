"""What is counted of which fact, and that counting harms nobody. That Ray offers it to Prometheus is in tests/integration."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from transplant_ray.distributed import meters
from transplant_ray.distributed.facts import (
    AtWork,
    EvaluatorDied,
    Fact,
    Paced,
    StageBegins,
    StageEnds,
    SweepBegins,
    SweepEnds,
    VariantDone,
    VariantsPlanned,
    of_shard,
)
from transplant_ray.distributed.meters import Meters, count_in_evaluator
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.outcome import Outcome

SHARD = VariantShard("v", tuple(Outcome("v", f"e{i}", "x", True, 7, True) for i in range(3)), 0.5)
TAGS = {"run": "r", "task": "facts", "split": "test"}
Noted = list[tuple[str, str, float, dict[str, str]]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """What Ray's metrics are told."""
    noted: Noted = []

    class Fake:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def __getattr__(self, verb: str) -> Any:
            return lambda value, tags: noted.append((verb, self.name.removeprefix("transplant_ray_"), value, tags))

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(meters, kind, Fake)
    meters._meter.cache_clear()
    yield noted
    meters._meter.cache_clear()


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        (
            of_shard("facts", "test", SHARD),
            [
                ("inc", "examples", 3, TAGS), ("inc", "tokens", 21, TAGS), ("inc", "shards", 1, TAGS),
                ("observe", "shard_seconds", 0.5, TAGS),
            ],
        ),
        (of_shard("facts", "test", VariantShard("v", SHARD.outcomes, 0.5, recalled=True)), [("inc", "recalled", 3, TAGS)]),
        (VariantsPlanned({"v": "lae", "w": "all"}), [("set", "variants_planned", 2, {"run": "r"})]),
        (VariantDone("v"), [("inc", "variants_done", 1, {"run": "r"})]),
        (EvaluatorDied("e", ("v",)), [("inc", "evaluator_deaths", 1, {"run": "r"})]),
        (
            AtWork(1, 2, 0.5),
            [
                ("set", "evaluators", 2, {"run": "r"}), ("set", "evaluators_at_work", 1, {"run": "r"}),
                ("set", "gpus_at_work", 0.5, {"run": "r"}),
            ],
        ),
        (StageBegins("evaluate", 3, "examples"), [("set", "stage", 1, {"run": "r", "stage": "evaluate"})]),
        (
            StageEnds("evaluate", 3.0),
            [("set", "stage", 0, {"run": "r", "stage": "evaluate"}), ("set", "seconds_left", 0, {"run": "r"})],
        ),
        (
            Paced(120.0, 9.0),
            [("set", "tokens_per_second", 120.0, {"run": "r"}), ("set", "seconds_left", 9.0, {"run": "r"})],
        ),
        (Paced(None, None), [("set", "tokens_per_second", 0.0, {"run": "r"})]),
    ],
)  # fmt: skip
def test_a_fact_is_counted(noted: Noted, fact: Fact, expected: Noted) -> None:
    Meters("r", alive=lambda: True).hear(fact)
    assert noted == expected


def test_an_evaluator_counts_what_it_did(noted: Noted) -> None:
    count_in_evaluator("r", SHARD)
    count_in_evaluator("r", VariantShard("v", (), 0.0, "NumericsError: NaN"))
    tags = {"run": "r"}
    assert noted == [
        ("inc", "evaluator_examples", 3, tags), ("inc", "evaluator_tokens", 21, tags), ("inc", "evaluator_failures", 1, tags),
    ]  # fmt: skip


def test_a_gauge_is_told_again_while_the_sweep_goes_on(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray forgets it otherwise."""
    monkeypatch.setattr(meters, "REFRESH_SECONDS", 0.01)
    running = Meters("r", alive=lambda: True)
    running.hear(SweepBegins("sweep", "runs/r"))
    running.hear(StageBegins("evaluate", 3, "examples"))
    deadline = time.monotonic() + 60
    while len(noted) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.hear(SweepEnds(0, 1.0))
    assert set(map(str, noted)) == {str(("set", "stage", 1, {"run": "r", "stage": "evaluate"}))}
    assert len(noted) >= 3


def test_nothing_is_counted_where_there_is_no_ray(noted: Noted) -> None:
    Meters("r", alive=lambda: False).hear(VariantDone("v"))
    assert noted == []


def test_what_goes_wrong_with_metrics_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def broken(name: str) -> Any:
        asked.append(name)
        raise RuntimeError(name)

    monkeypatch.setattr(meters, "_meter", broken)
    Meters("r", alive=lambda: True).hear(VariantDone("v"))
    counted = len(asked)
    count_in_evaluator("r", SHARD)
    assert 0 < counted < len(asked)


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    """As Prometheus has them, and shows all of them but those of one kind that another panel has."""
    root = Path(__file__).parents[3]
    dashboard = json.loads((root / "cluster" / "grafana.json").read_text())
    names = re.findall(r"ray_(transplant_ray_\w+)\{", json.dumps(dashboard["panels"]).replace('\\"', ""))
    suffixes = {
        **dict.fromkeys(meters.COUNTERS, "_total"),
        **dict.fromkeys(meters.HISTOGRAMS, "_bucket"),
        **dict.fromkeys(meters.GAUGES, ""),
    }
    offered = {f"transplant_ray_{name}{suffix}" for name, suffix in suffixes.items()}
    assert set(names) <= offered
    assert offered - set(names) == {f"transplant_ray_{name}_total" for name in ("tokens", "shards", "evaluator_examples")}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_docs_list_every_metric_with_its_tags_and_no_other() -> None:
    text = (Path(__file__).parents[3] / "docs" / "watching.md").read_text()
    rows = re.findall(r"^\| `transplant_ray_(\w+)` \| (\w+) \| ([^|]*) \|", text, flags=re.MULTILINE)
    kinds = {"counter": meters.COUNTERS, "gauge": meters.GAUGES, "histogram": meters.HISTOGRAMS}
    listed = {(name, kind, tuple(tags.split(", "))) for name, kind, tags in rows}
    assert listed == {(name, kind, tags) for kind, those in kinds.items() for name, (_, tags) in those.items()}
