"""Figures show what is in the results, and draw for sweeps of any shape."""

import io
from dataclasses import replace

import pytest

from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.results import Result, choose_winner, make_result
from transplant_ray.graft.plan import plan_sweep
from transplant_ray.models.catalogue import Module
from transplant_ray.models.families import Role
from transplant_ray.probe.rankers import Ranking
from transplant_ray.recipe import SweepSpec
from transplant_ray.tracking.figures import heat_map, k_curves

MODULES = [
    Module(f"model.layers.{layer}.{path}", layer, path, role, (4, 4), False, "F32", f"{layer}.{path}.weight", None)
    for layer in range(3)
    for path, role in (("self_attn.o_proj", Role("attn", "o")), ("mlp.down_proj", Role("ffn", "down")))
]


def results(**sweep: object) -> list[Result]:
    plan = plan_sweep(MODULES, {"lae": [m.name for m in MODULES]}, SweepSpec(k=(1, 2), **sweep))  # type: ignore[arg-type]
    by_name = {module.name: module for module in MODULES}
    target, source = Tally(50, 10, 1.0), Tally(50, 45, 1.0)
    tallies = {"target": target, "source": source}
    rows = [
        make_result(e, tallies.get(e.role, Tally(50, 10 + (e.k or 9), 1.0)), "select", by_name, target=target, source=source)
        for e in plan.entries
    ]
    winner = choose_winner(rows)
    assert winner is not None
    return [replace(row, winner=row is winner) for row in rows]


@pytest.mark.parametrize("kinds", [("all",), ("attn", "ffn", "all")])
def test_one_panel_a_kind_with_trials_controls_and_baselines(kinds: tuple[str, ...]) -> None:
    figure = k_curves(results(kind=kinds))
    assert [axis.get_title() for axis in figure.axes] == [f"kind: {kind}" for kind in kinds]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"lae", "random sets", "depth order", "target", "source", "all swapped", "winner"} <= labels


def test_alphas_are_curves_of_their_own() -> None:
    figure = k_curves(results(alpha=(0.5, 1.0)))
    assert {"lae", "lae alpha=0.5"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_a_sweep_whose_trials_all_failed_still_draws() -> None:
    failed = [replace(row, accuracy=None, winner=False, error="broken") for row in results()]
    figure, png = k_curves(failed), io.BytesIO()
    figure.savefig(png, format="png")
    assert png.getvalue()
    assert not any(len(line.get_xdata()) > 1 and line.get_label() == "lae" for axis in figure.axes for line in axis.lines)


def test_the_heat_map_has_every_score_at_its_layer_and_projection() -> None:
    scores = {module.name: float(index) for index, module in enumerate(MODULES)}
    figure = heat_map(Ranking("lae", scores), MODULES)
    grid = figure.axes[0].images[0].get_array()
    assert grid is not None
    assert grid.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
