"""By which rule a place wins, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from transplant_ray.evaluate.organ_choice import Comparison, choose_trial, compare_blocks, judge
from transplant_ray.report.organs import MEANINGS

DRAW = np.random.default_rng(0)
BEFORE = DRAW.normal(3, 0.5, 40)


def test_the_smallest_domain_loss_wins_and_the_earlier_of_equals() -> None:
    domain = {"a": 3.0, "b": 2.0, "c": 2.0}
    assert choose_trial(domain, dict.fromkeys(domain, 9.0), 1.0, None).winner == "b"


def test_what_costs_too_much_cannot_win() -> None:
    domain, general = {"a": 3.0, "b": 2.0, "c": 2.5}, {"a": 1.0, "b": 2.0, "c": 1.1}
    choice = choose_trial(domain, general, 1.0, 0.1 + 1e-9)
    assert (choice.winner, choice.vetoed) == ("c", ("b",))
    assert choose_trial(domain, general, 0.0, 0.1).winner is None
    assert choose_trial({}, {}, 1.0, None).winner is None


def test_blocks_are_paired_as_scipy_pairs_them() -> None:
    after = BEFORE - DRAW.normal(0.1, 0.2, 40)
    found, theirs = compare_blocks(BEFORE, after, 0.1), stats.ttest_rel(BEFORE, after)
    interval = theirs.confidence_interval(0.9)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.before, found.after, found.n) == pytest.approx((BEFORE.mean(), after.mean(), 40))


def test_of_a_single_block_nothing_is_known() -> None:
    found = compare_blocks(BEFORE[:1], BEFORE[:1] - 1, 0.05)
    assert (found.low, found.high, found.p) == (None, None, 1.0)
    assert not found.lowers
    assert not found.raises


@pytest.mark.parametrize(
    ("gain", "price", "over_untrained", "conclusion"),
    [
        (1.0, 0.5, 1.0, "confirmed, with loss"),
        (1.0, 0.001, 1.0, "confirmed"),  # within chance
        (1.0, -0.5, 1.0, "confirmed"),
        (1.0, 0.5, 0.0, "gain, not better than untrained layers"),
        (1.0, 0.5, None, "gain, untrained layers not tested"),
        (0.0, 0.5, 1.0, "not distinguishable from the recipient"),
        (-1.0, 0.5, 1.0, "worse than the recipient"),
    ],
)
def test_what_is_concluded(gain: float, price: float, over_untrained: float | None, conclusion: str) -> None:
    control = None if over_untrained is None else _gain(over_untrained)
    verdict = judge("organ a, before layer 1,", _gain(gain), _gain(-price), control, "its source is gone")
    assert verdict.conclusion == conclusion
    assert ("its source is gone" in verdict.sentence) == (control is None)
    assert "on general text it goes from" in verdict.sentence
    assert (MEANINGS[conclusion][0] == "good") == (conclusion == "confirmed")


def _gain(size: float) -> Comparison:
    spread = np.tile([0.1, -0.1], 20)
    return compare_blocks(BEFORE, BEFORE - size + spread, 0.05)
