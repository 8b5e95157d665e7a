"""Who watches hears everything, and a stage ends in the log also where it failed."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from transplant_ray.console import TerminalWatch, time_line
from transplant_ray.distributed.facts import AtWork, Fact, Note, Paced, StageBegins, StageEnds, VariantsAsked, of_shard
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.pipeline.pace import Pace
from transplant_ray.pipeline.watch import Silent, Stopwatch, Watches


class Kept(Silent):
    def __init__(self) -> None:
        self.heard: list[Fact] = []

    def hear(self, fact: Fact) -> None:
        self.heard.append(fact)


def shard(num: int) -> Fact:
    said = tuple(Outcome("v", f"e{i}", "x", True, 7, True) for i in range(num))
    return of_shard("task", "select", VariantShard("v", said, 1.0, evaluator="e"))


def test_all_who_listen_hear_stages_notes_and_facts() -> None:
    watch, listener = Kept(), Kept()
    stopwatch = Stopwatch(Watches(watch, [listener]))

    def fail() -> None:
        with stopwatch.stage("evaluate", 3, "variants"):
            stopwatch.watch.note("beware")
            stopwatch.watch.hear(AtWork(1, 1, 0.0))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert watch.heard == listener.heard
    assert listener.heard[:-1] == [StageBegins("evaluate", 3, "variants"), Note("beware"), AtWork(1, 1, 0.0)]
    assert listener.heard[-1] == StageEnds("evaluate", stopwatch.seconds["evaluate"])


def test_the_pace_is_told_every_few_seconds_and_not_at_every_step() -> None:
    now, listener = [0.0], Kept()
    watches = Watches(Silent(), [listener], Pace(lambda: now[0]))
    watches.stage("evaluate", 100, "examples")
    for second in range(1, 13):
        now[0] = float(second)
        watches.hear(shard(10))
        watches.advance(5)
    paced = [fact for fact in listener.heard if isinstance(fact, Paced)]
    assert paced == [Paced(70.0, 15.0), Paced(70.0, 10.0)]


def test_where_there_is_no_terminal_a_long_stage_says_again_that_it_lives() -> None:
    out = io.StringIO()
    with TerminalWatch(Console(file=out, width=80), beat=0.01) as watch:
        watch.hear(VariantsAsked(4))
        watch.stage("evaluate", 1234, "examples")
        watch.hear(AtWork(2, 2, 2.0))
        watch.hear(shard(10))
        watch.advance(10)
        deadline = time.monotonic() + 60
        while out.getvalue().count("10 of 1,234 examples") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, *others = out.getvalue().splitlines()
    assert first == "evaluate (1,234 examples)"
    assert re.fullmatch(r"evaluate: 10 of 1,234 examples, 0/4 variants, [\d,]+ tokens/s, 2 evaluators, 2 GPUs, .* left", others[-1])


def test_where_there_is_no_terminal_a_short_stage_is_one_line() -> None:
    out = io.StringIO()
    with TerminalWatch(Console(file=out, width=80)) as watch:
        watch.stage("prepare", 0)
        watch.stage("read references", 30, "variants")
        watch.advance(30)
        watch.note("a [bracket] is text")
    assert out.getvalue().splitlines() == ["prepare", "read references (30 variants)", "a [bracket] is text"]


def test_a_terminal_shows_a_bar_and_a_line_of_facts_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watch = TerminalWatch(console)
    watch.hear(VariantsAsked(1000))
    watch.stage("merge of equal distance", 1_234_567)
    watch.hear(AtWork(128, 128, 128.0))
    watch.hear(shard(10))
    watch.advance(10)
    watch.progress.facts = watch.pace.facts()
    with console.capture() as capture:
        console.print(watch.progress.get_renderable())
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in capture.get().splitlines()]
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert "merge of equal distance" in lines[0]
    assert "10/1234567" in lines[0]
    assert "0/1,000 variants" in lines[1]
    assert "128 evaluators, 128 GPUs" in lines[1]


def test_where_the_time_went_is_a_line() -> None:
    seconds = {"prepare": 1.0, "evaluate": 7000.0, "export": 300.0, "probe and rank": 400.0, "confirm": 100.0, "record": 5.0}
    told = "time: 2 h 10 min, of which evaluate 1 h 57 min, probe and rank 7 min, export 5 min, confirm 2 min, the rest 6 s"
    assert time_line({"seconds": seconds}) == [told]
    assert time_line({}) == []
