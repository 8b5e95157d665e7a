"""What a line of progress says: counts as they are, a pace of what was computed and not of what was recalled."""

from __future__ import annotations

import pytest

from transplant_ray.distributed.facts import AtWork, Fact, StageEnds, VariantDone, VariantRecalled, VariantsAsked, of_shard
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.pipeline.pace import MODELS, WINDOW_SECONDS, Pace, shown_seconds


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shard(num: int, tokens: int, *, recalled: bool = False, evaluator: str = "e") -> Fact:
    said = tuple(Outcome("v", f"e{i}", "x", True, tokens, True) for i in range(num))
    return of_shard("task", "select", VariantShard("v", said, 1.0, recalled=recalled, evaluator=evaluator))


def test_a_line_has_examples_variants_tokens_evaluators_and_the_time_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.hear(VariantsAsked(4))
    pace.begin("evaluate", 40, "examples")
    pace.hear(AtWork(2, 2, 1.0))
    assert pace.line() == "evaluate: 0 of 40 examples, 0/4 variants, 2 evaluators, 1 GPU"
    clock.now += 10
    pace.hear(shard(10, tokens=50))
    pace.advance(10)
    pace.hear(VariantDone("v"))
    assert pace.line() == "evaluate: 10 of 40 examples, 1/4 variants, 50 tokens/s, 2 evaluators, 1 GPU, 30 s left"


def test_what_was_recalled_is_progress_and_no_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("evaluate", 100, "examples")
    pace.hear(shard(80, tokens=50, recalled=True))
    pace.advance(80)
    assert (pace.seconds_left, pace.tokens_per_second) == (None, None)
    clock.now += 5
    pace.hear(shard(10, tokens=1))
    pace.advance(10)
    assert (pace.seconds_left, pace.tokens_per_second) == (5.0, 2.0)


def test_models_that_were_recalled_are_no_pace_either_whatever_their_examples() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("measure on select", 10, MODELS)
    for _ in range(5):
        pace.hear(shard(80, tokens=50, recalled=True))
        pace.hear(VariantRecalled("v", "select"))
        pace.advance(1)
    assert pace.seconds_left is None
    clock.now += 20
    pace.hear(shard(80, tokens=1))
    pace.advance(1)
    assert pace.seconds_left == 80


def test_tokens_are_those_of_the_last_minute() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("evaluate", 0, "examples")
    pace.hear(shard(1, tokens=9999))
    clock.now += WINDOW_SECONDS + 1
    assert pace.tokens_per_second is None
    pace.hear(shard(1, tokens=WINDOW_SECONDS))
    assert pace.tokens_per_second == 1


def test_a_stage_of_unknown_length_tells_for_how_long_it_goes_on() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("export", 0, "examples")
    clock.now += 600
    assert pace.line() == "export: for 10 min"


def test_between_stages_it_says_after_which() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("probe and rank", 10, "examples")
    pace.hear(StageEnds("probe and rank", 1.0))
    clock.now += 30
    pace.hear(shard(10, tokens=50, evaluator=""))
    assert pace.line() == "after probe and rank: for 30 s"


def test_a_new_stage_begins_at_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin("evaluate", 10, "examples")
    pace.hear(shard(10, tokens=5))
    pace.advance(10)
    clock.now += 10
    pace.begin("baselines on test", 7, "examples")
    assert pace.line() == "baselines on test: 0 of 7 examples"


def test_it_fits_into_a_terminal() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.hear(VariantsAsked(1000))
    pace.begin("evaluate", 10_000_000, "examples")
    pace.hear(AtWork(128, 128, 128.0))
    clock.now += 3600
    pace.hear(shard(1, tokens=7_400_000))
    pace.advance(12_000)
    assert len(pace.facts()) < 78, pace.facts()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3569, "59 min"), (3600, "1 h 00 min"), (11_100, "3 h 05 min"), (187_000, "2 d 3 h")],
)
def test_seconds_are_shown_in_what_people_count_by(seconds: float, shown: str) -> None:
    assert shown_seconds(seconds) == shown
