"""Maps have every score at its layer and projection."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import Made, ranking_rows

from transplant_ray.report.records import Score
from transplant_ray.report.scores import changed_map, depth_panel, heat_map

MADE = Made(rankers=("lae",), num_layers=3)
SCORES = [Score(**row) for row in ranking_rows(MADE)]
PROJECTIONS = ["k", "o", "q", "v", "down", "gate", "up"]


def cells(figure: Figure) -> np.ndarray:
    grid = figure.axes[0].collections[0].get_array()
    assert grid is not None
    return np.ma.filled(grid, np.nan)


def test_the_heat_map_has_every_score_at_its_layer_and_projection() -> None:
    figure = heat_map(SCORES)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == PROJECTIONS
    grid = cells(figure)
    assert grid.shape == (len(PROJECTIONS), 3)
    for score in SCORES:
        assert grid[PROJECTIONS.index(score.projection), score.layer] == pytest.approx(score.score)


def test_a_cell_without_a_module_is_empty_and_one_with_several_has_their_mean() -> None:
    twin = SCORES[0].model_copy(update={"module": "expert", "score": SCORES[0].score + 1})
    grid = cells(heat_map([SCORES[0], twin, next(s for s in SCORES if s.layer != SCORES[0].layer)]))
    assert np.nanmax(grid) == pytest.approx(SCORES[0].score + 0.5)
    assert np.isnan(grid).sum() == grid.size - 2


def test_scores_below_zero_are_told_from_those_above_by_colour() -> None:
    signed, positive = heat_map(SCORES), heat_map([s.model_copy(update={"score": abs(s.score)}) for s in SCORES])
    limits = [figure.axes[0].collections[0].get_clim() for figure in (signed, positive)]
    assert limits[0][0] == pytest.approx(-limits[0][1])
    assert limits[1][0] >= 0


def test_marked_modules_have_a_dot() -> None:
    marked = {SCORES[0].module, SCORES[5].module}
    dots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in heat_map(SCORES, marked).axes[0].lines}
    assert dots == {(s.layer, PROJECTIONS.index(s.projection)) for s in SCORES if s.module in marked}


def test_the_map_of_changes_has_the_coefficient_of_every_module() -> None:
    coefficients = {SCORES[0].module: 1.0, SCORES[1].module: 0.25, SCORES[2].module: [1.0, 0.0, 0.0, 0.0], "elsewhere": 1.0}
    grid = cells(changed_map(SCORES, coefficients))
    found = {s.module: grid[PROJECTIONS.index(s.projection), s.layer] for s in SCORES}
    assert {name for name, value in found.items() if value} == {s.module for s in SCORES[:3]}
    assert [found[s.module] for s in SCORES[:3]] == [1.0, 0.25, 0.25]


def test_the_depth_panel_has_every_score_beside_its_layer() -> None:
    axis = depth_panel(SCORES).axes[0]
    drawn = sorted((round(float(x)), float(y)) for line in axis.lines for x, y in zip(*line.get_data(), strict=True))
    assert drawn == sorted((score.layer, score.score) for score in SCORES)
    assert [line.get_label() for line in axis.lines] == ["attn", "ffn"]
