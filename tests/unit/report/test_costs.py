"""Gain against damage has every variant for which both are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Made, result_rows

from transplant_ray.report.costs import COSTS, measured_costs, trade_off
from transplant_ray.report.curves import comparable
from transplant_ray.report.look import series
from transplant_ray.report.records import Row, read_records, with_label

ROWS = read_records(Row, map(with_label, result_rows(Made(rankers=("lae", "channel"), ks=(1, 4), num_examples=50))), Path("x"))


@pytest.mark.parametrize("name", COSTS)
def test_every_variant_is_at_its_cost_and_its_gain(name: str) -> None:
    cost = COSTS[name]
    (axis,) = trade_off(ROWS, cost).axes
    rows = comparable(ROWS)
    target = next(row.accuracy for row in rows if row.role == "target")
    groups = {label: [row for row in rows if row.role == "trial" and series(row) == label] for label in ("lae", "channel", "gates")}
    groups["random sets"] = [row for row in rows if row.ranker == "random"]
    groups["depth order"] = [row for row in rows if row.ranker == "depth"]
    groups["uniform alpha"] = [row for row in rows if row.ranker == "uniform" or row.role in ("target", "all")]
    for label, members in groups.items():
        (line,) = [line for line in axis.lines if line.get_label() == label]
        found = sorted(zip(*line.get_data(), strict=True))
        expected = sorted((cost.of(row), 100 * (row.accuracy - target)) for row in members)
        assert found == [pytest.approx(point) for point in expected], label


def test_the_merges_are_a_path_from_the_target_to_all_swapped() -> None:
    (axis,) = trade_off(ROWS, COSTS["guards"]).axes
    (line,) = [line for line in axis.lines if line.get_label() == "uniform alpha"]
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    lost = {0.0: 0.0, **{r.alpha: 100 * (1 - r.guard_share) for r in ROWS if r.ranker == "uniform"}}
    lost[1.0] = next(100 * (1 - r.guard_share) for r in ROWS if r.role == "all")
    assert list(line.get_xdata()) == [pytest.approx(lost[alpha]) for alpha in alphas]


def test_only_what_was_measured_is_a_cost() -> None:
    assert measured_costs(ROWS) == ["guards", "kl"]
    assert measured_costs([row.model_copy(update={"kl": None}) for row in ROWS]) == ["guards"]
    baselines_alone = [row if row.role == "target" else row.model_copy(update={"kl": None, "guard_share": None}) for row in ROWS]
    assert measured_costs(baselines_alone) == []


def test_a_variant_without_a_cost_is_no_point() -> None:
    rows = [row.model_copy(update={"kl": None}) if row.k == 4 and row.role == "trial" else row for row in ROWS]
    (axis,) = trade_off(rows, COSTS["kl"]).axes
    (line,) = [line for line in axis.lines if line.get_label() == "lae"]
    assert len(line.get_xdata()) == sum(row.ranker == "lae" and row.k == 1 for row in rows)
