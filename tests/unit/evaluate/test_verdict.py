"""Every phrase of the verdict and its sentence, and by simulation: how often chance is confirmed, and how often a real gain is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from transplant_ray.evaluate.arms import Arms
from transplant_ray.evaluate.choosing import Candidate, choose
from transplant_ray.evaluate.metrics import standard_error
from transplant_ray.evaluate.significance import ALPHA, Guard, Right, arms_needed, mean_score
from transplant_ray.evaluate.verdict import Evidence, judge, no_gap


def first(correct: int, n: int = 100) -> Right:
    """The first examples right: two such vectors differ as little as they can."""
    return np.arange(n) < correct


ARMS = Arms(scores=(0.55,) * 19, sets_each=24)
UNHARMED = Guard("reading", first(150, 200), first(150, 200), margin=0.03)
HARMED = Guard("spelling", first(150, 200), first(140, 200), margin=0.03)
FLAT = Guard("counting", first(15, 20), first(15, 20), margin=0.03)
"""Unharmed, as far as 20 examples can tell."""
EVIDENCE = Evidence(
    select_target=first(40), select_source=first(80), target=first(40), winner=first(60),
    size=8, num_modules=64, chosen_from=24, arms=ARMS, guards=(UNHARMED,),
)  # fmt: skip


def test_confirmed() -> None:
    assert judge(EVIDENCE).conclusion == "confirmed"
    assert judge(EVIDENCE).sentence == (
        "the winner is right on 60.0 % of 100 test examples, the target on 40.0 % (20 gained, 0 lost, p = 1.9e-06); "
        "0 of 19 arms of 24 random sets each did as well (p = 0.05); "
        "no guard lost more than its margin (reading +0.0 points, at worst -1.3, margin 3.0, p = 0.0064); "
        "about 37 examples would show a gain of this size."
    )
    assert judge(EVIDENCE).chance == 0.05
    assert (judge(EVIDENCE).examples_needed, judge(EVIDENCE).arms_needed) == (37, None)


def test_without_guards_the_sentence_says_so() -> None:
    bare = judge(replace(EVIDENCE, guards=()))
    assert bare.conclusion == "confirmed"
    assert bare.sentence.endswith("(p = 0.05); no guard was measured; about 37 examples would show a gain of this size.")


def test_a_guard_that_lost_more_than_its_margin() -> None:
    verdict = judge(replace(EVIDENCE, guards=(UNHARMED, HARMED)))
    assert verdict.conclusion == "confirmed, with loss"
    assert "; a loss over the margin is not ruled out (spelling -5.0 points, at worst " in verdict.sentence
    assert verdict.sentence.endswith(": no number of examples would rule it out).")
    assert verdict.examples_needed is None
    assert [guard.holds for guard in verdict.guards] == [True, False]


def test_a_guard_with_too_few_examples_is_a_loss_that_more_of_them_may_rule_out() -> None:
    verdict = judge(replace(EVIDENCE, guards=(UNHARMED, FLAT)))
    assert verdict.conclusion == "confirmed, with loss"
    assert verdict.examples_needed is not None
    assert verdict.sentence.endswith(f": about {verdict.examples_needed:,} examples would rule it out).")
    both = judge(replace(EVIDENCE, guards=(HARMED, FLAT)))
    assert both.examples_needed is None  # one of them can never be


@pytest.mark.parametrize(
    ("arms", "missing"),
    [
        (None, "to tell it from chance takes 19 arms of 24 random sets each or more, and there are none"),
        (Arms((), 24), "to tell it from chance takes 19 arms of 24 random sets each or more, and there are none"),
        (Arms((0.55,) * 18, 24), "and there are 18 arms of 24 random sets each"),
        (Arms((0.55,) * 99, 1), "and there are 99 random sets"),
    ],
)
def test_plain_random_sets_or_few_arms_do_not_test_the_best_of_24(arms: Arms | None, missing: str) -> None:
    verdict = judge(replace(EVIDENCE, arms=arms))
    assert verdict.conclusion == "gain, chance not tested"
    assert verdict.sentence.endswith(f"{missing}.")
    assert (verdict.chance, verdict.arms_needed) == (None, 19)


def test_a_variant_named_beforehand_needs_19_plain_sets() -> None:
    verdict = judge(replace(EVIDENCE, chosen_from=1, arms=Arms((0.55,) * 19, 1)))
    assert verdict.conclusion == "confirmed"
    assert "; 0 of 19 random sets did as well (p = 0.05); " in verdict.sentence


@pytest.mark.parametrize(("scores", "as_good"), [((0.6,) + (0.5,) * 18, 1), ((0.61,) * 19, 19)])
def test_an_arm_that_does_as_well(scores: tuple[float, ...], as_good: int) -> None:
    verdict = judge(replace(EVIDENCE, arms=Arms(scores, 24)))
    assert verdict.conclusion == "gain, not better than chance"
    assert verdict.chance == (1 + as_good) / 20
    assert f"; {as_good} of 19 arms of 24 random sets each did as well (p = {verdict.chance:.2g}); " in verdict.sentence
    assert verdict.sentence.endswith("with this share, no number of arms would tell.")
    assert verdict.arms_needed is None


def test_one_arm_of_thirty_leaves_it_to_more_arms() -> None:
    verdict = judge(replace(EVIDENCE, arms=Arms((0.6,) + (0.5,) * 29, 24)))
    assert verdict.conclusion == "gain, not better than chance"
    assert verdict.arms_needed == arms_needed(1, 30)
    assert verdict.sentence.endswith(f"with this share, about {verdict.arms_needed} arms would tell.")


def test_over_half_of_the_modules_chance_cannot_be_tested_and_half_is_not_over() -> None:
    verdict = judge(replace(EVIDENCE, size=33))
    assert verdict.conclusion == "gain, chance not testable"
    assert verdict.sentence.endswith(
        "33 of 64 modules are over half, where random sets are nearly the same set: chance can be tested up to K = 32; "
        "about 37 examples would show a gain of this size."
    )
    assert verdict.chance is None
    assert judge(replace(EVIDENCE, size=32)).conclusion == "confirmed"


def test_a_guard_that_nobody_could_measure_is_a_loss_that_is_not_ruled_out() -> None:
    verdict = judge(replace(EVIDENCE, missing=("sorting",)))
    assert verdict.conclusion == "confirmed, with loss"
    assert "it could not be measured on sorting, so no loss there is ruled out" in verdict.sentence
    (alone,), (beside,) = judge(EVIDENCE).guards, verdict.guards
    assert beside.p_holm == min(1, 2 * alone.p)  # it keeps its place in Holm's adjustment


def test_five_more_of_fifty_is_not_a_gain() -> None:
    """The best cell of the paper's table."""
    verdict = judge(replace(EVIDENCE, target=first(8, 50), winner=first(13, 50)))
    assert verdict.conclusion == "not distinguishable from the target"
    assert verdict.sentence == (
        "the winner is right on 26.0 % of 50 test examples, the target on 16.0 % (5 gained, 0 lost, p = 0.062); "
        "about 77 examples would show a gain of this size."
    )
    assert verdict.examples_needed == 77


def test_without_any_difference_no_number_would_do() -> None:
    verdict = judge(replace(EVIDENCE, winner=first(40)))
    assert verdict.conclusion == "not distinguishable from the target"
    assert verdict.sentence.endswith("nothing points to a gain, so no number of examples would show it.")
    assert verdict.examples_needed is None


def test_worse_than_the_target() -> None:
    verdict = judge(replace(EVIDENCE, winner=first(20)))
    assert verdict.conclusion == "worse than the target"
    assert verdict.sentence.endswith("(0 gained, 20 lost, p = 1.9e-06); no number of examples would make this a gain.")


def test_no_gap_to_close() -> None:
    verdict = judge(replace(EVIDENCE, select_source=first(44)))
    assert verdict.conclusion == "no gap to close"
    assert verdict.sentence == (
        "the source is right on 44.0 % of 100 select examples, the target on 40.0 % (4 gained, 0 lost, one-sided p = 0.062); "
        "about 153 examples would show a gap of this size."
    )
    assert (verdict.gain, verdict.examples_needed) == (None, 153)
    worse = no_gap(first(40), first(30))
    assert worse is not None
    assert worse.sentence.endswith("nothing points to a gap, so no number of examples would show it.")


def test_the_gap_is_one_sided() -> None:
    assert no_gap(first(40), first(45)) is None  # 5 gained, 0 lost: 0.03 one-sided, 0.06 two-sided


# Whatever the evidence.


ANSWERS = st.tuples(*[st.integers(0, 2**30 - 1)] * 4)


@settings(max_examples=100, deadline=None)
@given(ANSWERS, st.integers(1, 64), st.integers(1, 24), st.lists(st.integers(0, 30), max_size=25), st.integers(1, 24))
def test_the_phrase_follows_from_the_numbers(
    bits: tuple[int, int, int, int], k: int, chosen_from: int, arms: list[int], sets_each: int
) -> None:
    vectors = [np.array([answer >> i & 1 for i in range(30)], dtype=bool) for answer in bits]
    guard = Guard("general", vectors[2], vectors[3], 0.1)
    verdict = judge(Evidence(*vectors, k, 64, chosen_from, Arms(tuple(arm / 30 for arm in arms), sets_each), (guard,)))
    assert verdict.sentence.endswith(".")
    assert (verdict.gain is None) == (verdict.conclusion == "no gap to close") == (verdict.gap.p_better > ALPHA)
    if verdict.gain:
        better = verdict.gain.p <= ALPHA and verdict.gain.difference > 0
        assert better == (verdict.conclusion.startswith(("gain", "confirmed")))
    if verdict.chance is not None:
        assert len(arms) >= 19
        assert sets_each >= chosen_from
        assert k <= 32
        assert (verdict.chance <= ALPHA) == verdict.conclusion.startswith("confirmed")
    if verdict.conclusion.startswith("confirmed"):
        assert (verdict.conclusion == "confirmed") == all(guard.holds for guard in verdict.guards)


# What the verdict is worth.

NUM_SETS, NUM_ARMS, N = 24, 19, 300
CORRELATION = 0.7
"""Of the latent normal that decides an item, between any two variants: items are hard for all of them."""
TARGET, SOURCE = 0.4, 0.8
KS = [k for k in (2, 4, 8, 16, 24, 32) for _ in range(4)]
SEED = 20260


def answer(rng: np.random.Generator, accuracies: np.ndarray) -> np.ndarray:
    """(V, N) right or wrong on new items, by a Gaussian copula with these accuracies (V,)."""
    shared = np.sqrt(CORRELATION) * rng.standard_normal(N, dtype=np.float32)
    own = rng.standard_normal((len(accuracies), N), dtype=np.float32)
    scale = np.sqrt(1 - CORRELATION)  # right where shared + scale · own is under the bar
    return own < (norm.ppf(accuracies) / scale).astype(np.float32)[:, None] - (shared / scale).astype(np.float32)


def sweep(rng: np.random.Generator, spread: float, over_chance: float) -> Evidence:
    """One sweep of 24 trials, and 19 arms of 24 sets. True accuracies differ by `spread`; trials are better by `over_chance`."""
    truth = rng.normal(TARGET, spread, (1 + NUM_ARMS, NUM_SETS))
    truth[0] += over_chance
    truth = truth.clip(0.01, 0.99)
    select = answer(rng, np.array([TARGET, SOURCE, *truth.flat]))
    accuracies = select[2:].mean(axis=1).reshape(truth.shape).tolist()
    chosen = [choose([Candidate(a, standard_error(a, N), k, k) for a, k in zip(each, KS, strict=True)]) for each in accuracies]
    test = answer(rng, np.array([TARGET, *truth[range(1 + NUM_ARMS), chosen]]))
    arms = Arms(tuple(right / N for right in test[2:].sum(axis=1).tolist()), NUM_SETS)
    return Evidence(select[0], select[1], test[0], test[1], KS[chosen[0]], 64, NUM_SETS, arms)


def num_confirmed(sweeps: int, spread: float, over_chance: float) -> int:
    rng = np.random.default_rng(SEED)
    return sum(judge(sweep(rng, spread, over_chance)).conclusion == "confirmed" for _ in range(sweeps))


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.12])
def test_a_ranker_that_knows_nothing_is_confirmed_in_at_most_5_percent(spread: float) -> None:
    """Where sets do not differ at all, and where they do and the best of 24 is truly better than the target.

    A thousand sweeps, for 300 leave it to luck: with this seed 25 of the first 300 are confirmed at a spread of 0.12, two over that
    bar; of 4,000 others 4.9 % (95 % interval 4.3 to 5.6).
    """
    assert num_confirmed(1000, spread, over_chance=0.0) <= binom.ppf(0.975, 1000, 0.05)


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_fifteen_points_over_chance_are_confirmed_in_at_least_80_percent(spread: float) -> None:
    assert num_confirmed(300, spread, over_chance=0.15) >= 0.8 * 300


def test_where_sets_differ_by_twelve_points_fifteen_over_chance_are_often_missed() -> None:
    """The best of 19 arms is then far over the target too. Of 2,000 sweeps 57 % were confirmed, and with 99 arms 65 % of 300."""
    assert 0.5 * 300 < num_confirmed(300, 0.12, over_chance=0.15) < 0.8 * 300


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_of_a_sweep_and_its_arms_at_most_one_would_be_better_than_chance(seed: int) -> None:
    """Whatever the data: so where they are alike, and any of the 20 may be the sweep, at most a twentieth is confirmed."""
    evidence = sweep(np.random.default_rng(seed), spread=0.12, over_chance=0.0)
    assert evidence.arms is not None
    everyone = (mean_score(evidence.winner), *evidence.arms.scores)
    verdicts = []
    for i, score in enumerate(everyone):
        others = Arms((*everyone[:i], *everyone[i + 1 :]), NUM_SETS)
        verdicts.append(judge(replace(evidence, winner=first(round(score * N), N), target=first(0, N), arms=others)))
    assert sum(verdict.conclusion == "confirmed" for verdict in verdicts) <= 1
    assert all(verdict.chance is not None for verdict in verdicts)


def test_the_simulated_items_are_as_hard_and_as_correlated_as_they_should_be() -> None:
    rng = np.random.default_rng(3)
    right = np.concatenate([answer(rng, np.array([0.4, 0.5, 0.5])) for _ in range(100)], axis=1)
    assert right.mean(axis=1) == pytest.approx([0.4, 0.5, 0.5], abs=0.015)
    assert (right[1] & right[2]).mean() == pytest.approx(0.25 + np.arcsin(CORRELATION) / (2 * np.pi), abs=0.015)  # Sheppard 1899
