"""No text is read twice with the same variant, whoever died in between; what is not a number is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from transplant_ray.distributed.pool import Pool
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.reading import read_divergences, read_losses
from transplant_ray.pipeline.run import Memory, Run
from transplant_ray.shelf import Shelf

TEXTS = tuple(Rendered(f"t{i}", (1, i), (2, 3), "x") for i in range(5))
OTHERS = tuple(Rendered(f"t{i}", (1, i), (2, 4), "y") for i in range(5))
VARIANTS = [Variant({f"m{i}": 1.0}) for i in range(6)]
BROKEN = VARIANTS[4]


def run_with(folder: Path | None, texts: Sequence[Rendered] = TEXTS) -> Run:
    """As another process opens it."""
    memory = folder and Memory(Ledger(Shelf(str(folder)), lambda _: None), ("source", "target"), "float32")
    job = SimpleNamespace(passages={"select": texts}, rules=Rules(GenerationSettings(4, (2,)), "exact"))
    return cast(Run, SimpleNamespace(job=job, memory=memory))


def number(variant: Variant, text: Rendered) -> float | None:
    return None if variant is BROKEN else hash((variant.id, text.prompt_ids, text.answer_ids)) / 2**61


@dataclass
class FakePool:
    """Reads in packs of two, and dies after so many."""

    read: list[str] = field(default_factory=list)
    most: int = 1000

    def losses(self, variants: Sequence[Variant], examples: Sequence[Rendered], _rules: Rules, on_read: Any) -> None:
        for pack in self._packs(variants):
            on_read({v.id: None if v is BROKEN else sum(number(v, e) or 0 for e in examples) for v in pack})

    def divergences(self, variants: Sequence[Variant], texts: Sequence[Rendered], _rules: Rules, on_read: Any) -> None:
        for pack in self._packs(variants):
            on_read({v.id: tuple(number(v, text) for text in texts) for v in pack})

    def _packs(self, variants: Sequence[Variant]) -> Any:
        for start in range(0, len(variants), 2):
            if start // 2 == self.most:
                raise KeyboardInterrupt
            yield variants[start : start + 2]
            self.read += [variant.id for variant in variants[start : start + 2]]


def read(what: str, run: Run, pool: FakePool, texts: Sequence[Rendered] = TEXTS) -> tuple[Any, int]:
    """What was found, and how far the bar has come."""
    steps: list[int] = []
    if what == "losses":
        return read_losses(run, cast(Pool, pool), VARIANTS, texts, steps.append), sum(steps)
    return read_divergences(run, cast(Pool, pool), VARIANTS, "select", steps.append), sum(steps)


@pytest.mark.parametrize("what", ["losses", "divergences"])
@pytest.mark.parametrize("most", range(4))
def test_a_run_that_died_reads_on_where_it_stopped(tmp_path: Path, what: str, most: int) -> None:
    calm = read(what, run_with(None), FakePool())
    first, second = FakePool(most=most), FakePool()
    if most < 3:
        with pytest.raises(KeyboardInterrupt):
            read(what, run_with(tmp_path), first)
    else:
        read(what, run_with(tmp_path), first)
    assert read(what, run_with(tmp_path), second) == calm
    twice = [id for id in second.read if id in first.read]
    assert twice == ([BROKEN.id] if most == 3 else [])
    assert {*first.read, *second.read} == {variant.id for variant in VARIANTS}


@pytest.mark.parametrize("what", ["losses", "divergences"])
def test_other_texts_are_not_known(tmp_path: Path, what: str) -> None:
    read(what, run_with(tmp_path), FakePool())
    pool = FakePool()
    found, _ = read(what, run_with(tmp_path, OTHERS), pool, OTHERS)
    assert len(pool.read) == len(VARIANTS)
    assert found == read(what, run_with(None, OTHERS), FakePool(), OTHERS)[0]


def test_a_loss_and_a_divergence_of_one_text_are_two_things(tmp_path: Path) -> None:
    one = TEXTS[:1]
    losses, _ = read("losses", run_with(tmp_path, one), FakePool(), one)
    pool = FakePool()
    read("divergences", run_with(tmp_path, one), pool)
    assert len(pool.read) == len(losses) == len(VARIANTS)
