"""The spool: what is kept comes back as it was, from memory and from the disk, and none of it stays in memory."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from transplant_ray.errors import RunError
from transplant_ray.evaluate import spool as module
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.spool import Slip, Spool
from transplant_ray.shelf import Shelf

EXAMPLES = tuple(Rendered(f"e{i}", (1, i + 5), (2,), f"a{i}") for i in range(50))


def outcomes(variant: str) -> tuple[Outcome, ...]:
    awkward = {"completion": "é \u2028 \x00 \U0001f600", "loss": 0.1 + 0.2, "error": "no match"}
    plain = [
        Outcome(variant, example.id, f"{variant} says {example.id}", bool(i % 2), i, True) for i, example in enumerate(EXAMPLES)
    ]
    return (*plain[:-1], replace(plain[-1], **awkward))


@pytest.fixture(params=[0, module.IN_MEMORY], ids=["on disk", "in memory"])
def spool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spool:
    monkeypatch.setattr(module, "IN_MEMORY", request.param)
    return Spool()


def test_what_is_kept_comes_back_in_any_order(spool: Spool) -> None:
    slips = {name: spool.keep(outcomes(name)) for name in "abc"}
    empty = spool.keep(())
    for name in "cab":
        assert spool.read(slips[name]) == outcomes(name)
    assert spool.read(empty) == ()


def test_threads_share_it(spool: Spool) -> None:
    def keep_and_read(number: int) -> bool:
        mine = outcomes(str(number))
        return all(spool.read(spool.keep(mine)) == mine for _ in range(20))

    with ThreadPoolExecutor(4) as hands:
        assert all(hands.map(keep_and_read, range(8)))


@pytest.mark.parametrize("room", [0, 4096, 20_000])
def test_no_room_is_said_and_what_was_kept_before_is_there(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """On its way to the disk and on it: a disk takes what fits, and then nothing. Once there is room it goes on."""
    monkeypatch.setattr(module, "IN_MEMORY", 10_000)
    spool, names = Spool(), iter(map(str, range(1000)))
    kept: dict[str, Slip] = {}

    def keep(until: int) -> None:
        while spool._end < until:
            name = next(names)
            kept[name] = spool.keep(outcomes(name))

    def some(file: int, content: memoryview, at: int) -> int:
        if at >= room:
            raise OSError(28, "No space left on device")
        return write(file, content[: max(1, room - at)], at)

    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", some)
        for _ in range(2):
            with pytest.raises(RunError, match=r"answers cannot be kept in /\S+: No space left on device\. Make room .* TMPDIR"):
                keep(100_000)
    assert kept
    keep(100_000)
    assert all(spool.read(slip) == outcomes(name) for name, slip in kept.items())


def test_a_run_holds_no_outcome_in_memory(tmp_path: Path) -> None:
    """However many there are: those of a ledger that is opened again, too."""
    for opening in range(2):
        ledger, answers = Ledger(Shelf(str(tmp_path)), print), Answers()
        for number in range(100):
            shard = ledger.recall("page", f"v{number}", EXAMPLES)
            assert len(shard.outcomes) == (len(EXAMPLES) if opening else 0)
            shard = VariantShard(f"v{number}", outcomes(f"v{number}"), 1.0)
            ledger.keep("page", shard, EXAMPLES)
            answers.add("select", shard)
        ledger.write()
        del shard
        assert not [each for each in gc.get_objects() if isinstance(each, Outcome)]
        assert list(answers.outcomes("select", "v7")) == list(outcomes("v7"))
