"""Which learning rate is chosen, what is said of differences and of positions, on made-up numbers, against scipy."""

from __future__ import annotations

from math import isclose, log
from typing import Any

import numpy as np
import pytest
from scipy import stats

from transplant_ray.evaluate.learning import choose_rates, early_and_late, find
from transplant_ray.evaluate.metrics import crossed_interval
from transplant_ray.organ.lessons import Learnt, SiteLoss

RATES = (1e-4, 3e-4, 1e-3)


def learnt(method: str, lr: float | None = 1e-3, seed: int | None = 0, **said: Any) -> Learnt:
    stage = "before" if method == "before" else said.pop("stage", "confirm")
    return Learnt(f"{method}-{lr}-{seed}", "m", method, stage, lr, seed, **said)


def tuned(method: str, *losses: float | None) -> list[Learnt]:
    """None is a training that diverged."""
    return [
        learnt(method, lr, 1000, stage="tune", select=loss, error="diverged" if loss is None else None)
        for lr, loss in zip(RATES, losses, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "lr", "at_edge"),
    [
        ((2.0, 1.0, 3.0), 3e-4, False),
        ((1.0, 2.0, 3.0), 1e-4, True),
        ((3.0, 2.0, 1.0), 1e-3, True),
        ((3.0, 2.0, None), 3e-4, False),  # beyond it there is nothing to be found
        ((1.0, 1.0, 3.0), 1e-4, True),  # of equal ones the lowest
        ((None, 5.0, None), 3e-4, False),
        ((None, None, None), None, False),
    ],
)
def test_the_rate_of_the_lowest_loss_is_chosen(losses: tuple[float | None, ...], lr: float | None, at_edge: bool) -> None:
    (choice,) = choose_rates(tuned("organ", *losses))
    assert (choice.lr, choice.at_edge) == (lr, at_edge)
    assert [rate.error for rate in choice.rates] == ["diverged" if loss is None else None for loss in losses]


def test_a_grid_of_one_has_no_edge() -> None:
    (choice,) = choose_rates(tuned("organ", 1.0, 2.0, 3.0)[:1])
    assert not choice.at_edge


def test_each_method_is_chosen_for_by_itself() -> None:
    choices = choose_rates([*tuned("organ", 2, 1, 3), *tuned("lora", 3, 2, 1)])
    assert {choice.method: choice.lr for choice in choices} == {"organ": 3e-4, "lora": 1e-3}


@pytest.fixture(scope="module")
def blocks() -> dict[tuple[str, int], np.ndarray]:
    """Losses of 40 blocks; the organ is 0.3 better than LoRA, and full fine-tuning varies by seed."""
    draw = np.random.default_rng(0)
    text = draw.normal(3, 0.5, 40)
    shifts = {"organ": (0.0, 0.02, -0.01), "lora": (0.3, 0.33, 0.28), "full": (0.9, -0.9, 0.2)}
    return {
        (method, seed): text + shift + draw.normal(0, 0.05, 40)
        for method, each in shifts.items()
        for seed, shift in enumerate(each)
    }


def confirmed(blocks: dict[tuple[str, int], np.ndarray]) -> list[Learnt]:
    return [
        learnt(
            method, seed=seed, test={"domain": tuple(losses), "general": tuple(losses + 1)}, parameters=5, bytes=10, seconds=seed
        )
        for (method, seed), losses in blocks.items()
    ]


BEFORE = learnt("before", None, None, test={"domain": (4.0, 4.5), "general": (3.0, 3.5)}, select=4.0)


def test_standings_are_means_over_seeds_with_students_interval(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    findings = find([BEFORE], [], confirmed(blocks))
    standing = next(each for each in findings.standings if each.method == "lora")
    means = [blocks["lora", seed].mean() for seed in range(3)]
    expected = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert standing.loss["domain"] == pytest.approx(np.mean(means))
    assert standing.interval["domain"] == pytest.approx(expected)
    assert standing.change["general"] == pytest.approx(np.mean(means) + 1 - 3.25)
    assert standing.change_interval["general"] == pytest.approx(np.array(expected) + 1 - 3.25)
    assert standing.seconds == 1


def test_differences_are_paired_by_seed_and_within_it_by_block(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    findings = find([BEFORE], [], confirmed(blocks))
    found = next(each for each in findings.differences if (each.first, each.second, each.text) == ("organ", "lora", "domain"))
    ours, theirs = (np.array([blocks[method, seed] for seed in range(3)]) for method in ("organ", "lora"))
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert found.interval == pytest.approx(crossed_interval((ours - theirs).tolist()))
    assert found.verdict == "the organ is better than LoRA on domain text"
    for within in found.within:
        test = stats.ttest_rel(blocks["organ", within.seed], blocks["lora", within.seed])
        assert within.p == pytest.approx(test.pvalue, rel=1e-6)
        assert within.n == 40
        assert within.difference < 0


def test_what_varies_by_seed_is_not_told_apart_though_every_seed_is_sure(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    findings = find([BEFORE], [], confirmed(blocks))
    found = next(each for each in findings.differences if (each.second, each.text) == ("full", "domain") and each.first == "organ")
    assert found.verdict == "the organ and full fine-tuning cannot be told apart on domain text"
    assert all(within.p < 1e-3 for within in found.within)


def test_seeds_that_agree_say_nothing_where_blocks_do_not() -> None:
    """On one text all seeds find nearly the same; on another text they could all find the opposite."""
    draw = np.random.default_rng(1)
    text, noise = draw.normal(3, 0.5, 40), draw.normal(0, 0.3, 40)
    blocks = {("lora", seed): text + draw.normal(0, 1e-3, 40) for seed in range(3)}
    blocks |= {("organ", seed): text + noise - noise.mean() - 0.02 + draw.normal(0, 1e-3, 40) for seed in range(3)}
    found = next(each for each in find([BEFORE], [], confirmed(blocks)).differences if each.text == "domain")
    over_seeds = stats.ttest_rel(*([blocks[method, seed].mean() for seed in range(3)] for method in ("organ", "lora")))
    assert over_seeds.pvalue < 0.001
    assert found.verdict == "the organ and LoRA cannot be told apart on domain text"


def test_the_other_way_round_it_is_worse(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    swapped = {({"organ": "lora", "lora": "organ"}.get(method, method), seed): each for (method, seed), each in blocks.items()}
    verdicts = [each.verdict for each in find([BEFORE], [], confirmed(swapped)).differences]
    assert "the organ is worse than LoRA on domain text" in verdicts


def test_one_seed_says_nothing_of_chance(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    findings = find([BEFORE], [], [each for each in confirmed(blocks) if each.seed == 0])
    assert {each.interval for each in findings.differences} == {None}
    assert all("a single seed" in each.verdict for each in findings.differences)
    assert {each.interval["domain"] for each in findings.standings} == {None}


def test_seeds_that_failed_are_left_out_of_both_sides(blocks: dict[tuple[str, int], np.ndarray]) -> None:
    every = [learnt("lora", seed=1, error="diverged") if (e.method, e.seed) == ("lora", 1) else e for e in confirmed(blocks)]
    findings = find([BEFORE], [], every)
    standing = next(each for each in findings.standings if each.method == "lora")
    assert (standing.seeds, standing.failed) == ((0, 2), (1,))
    assert {each.n for each in findings.differences if "lora" in (each.first, each.second)} == {2}


def curve(seed: int, *losses: float | None) -> Learnt:
    """Of two blocks, one as much above the mean as the other is below."""
    blocks = [() if loss is None else (loss - 0.5, loss + 0.5) for loss in losses]
    sites = tuple(SiteLoss("insert", at, loss, block) for at, (loss, block) in enumerate(zip(losses, blocks, strict=True)))
    return learnt("organ", seed=seed, sites=sites, test={"domain": (1.0,), "general": (1.0,)})


def test_positions_are_cut_in_halves_without_the_middle() -> None:
    assert early_and_late(curve(0, 1, 2, 9, 4, 5), "insert") == ([1.0, 2.0], [4.0, 5.0])
    assert early_and_late(curve(0, 1, 2, 4, 5), "insert") == ([1.0, 2.0], [4.0, 5.0])
    assert early_and_late(curve(0, 1), "insert") is None
    assert early_and_late(curve(0, 1, None), "insert") is None
    assert early_and_late(curve(0, 1, 2), "replace") is None


def test_early_against_late_is_one_contrast_over_seeds() -> None:
    seeds = [curve(0, 1, 2, 3), curve(1, 1, 2, 3.2), curve(2, 1, 2, 2.9)]
    (found,) = find([BEFORE], [], seeds).contrasts
    expected = stats.t.interval(0.95, 2, np.mean([2, 2.2, 1.9]), stats.sem([2, 2.2, 1.9]))
    assert found.interval == pytest.approx(expected)
    assert isclose(found.difference, np.mean([2, 2.2, 1.9]))
    assert found.verdict == "early positions are better than late ones to insert"
    turned = [curve(seed, *(site.loss for site in reversed(each.sites))) for seed, each in enumerate(seeds)]
    assert find([BEFORE], [], turned).contrasts[0].verdict == "early positions are worse than late ones to insert"
    flat = [curve(0, 1, 2, 3), curve(1, 3, 2, 1), curve(2, 1, 2, log(3))]
    assert "cannot be told apart" in find([BEFORE], [], flat).contrasts[0].verdict
