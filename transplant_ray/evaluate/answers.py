"""Answers: the outcomes of a run as they arrive, by split and variant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.outcome import Outcome, Tally
from transplant_ray.evaluate.spool import Slip, Spool

if TYPE_CHECKING:
    from transplant_ray.evaluate.significance import Scores


@dataclass(frozen=True)
class VariantShard:
    """Outcomes of one variant on one shard of examples, or the reason why there are none."""

    variant: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    error: str | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of how it went."""
    recalled: bool = False
    """Whether it was known, and nothing was computed."""
    evaluator: str = ""
    node: str = ""
    """The beginnings of Ray's ids of who answered, and where; of a model that answers by itself nothing is said."""
    asked: str = ""
    """Which examples, as `shard_name` has them, where there are no outcomes to tell."""


def shard_name(ids: Sequence[str]) -> str:
    """The first example and how many: `EXAMPLE+15`."""
    return f"{ids[0]}+{len(ids)}"


class Answers:
    """Tallies are in memory, the outcomes themselves in a spool."""

    def __init__(self) -> None:
        self.tallies: dict[Split, dict[str, Tally]] = {}
        self._slips: dict[Split, dict[str, list[Slip]]] = {}
        self._spool = Spool()

    def add(self, split: Split, shard: VariantShard) -> None:
        self._slips.setdefault(split, defaultdict(list))[shard.variant].append(self._spool.keep(shard.outcomes))
        tallies = self.tallies.setdefault(split, {})
        tallies[shard.variant] = add_shard(tallies.get(shard.variant), shard)

    def outcomes(self, split: Split, variant: str | None = None) -> Iterator[Outcome]:
        """Of one variant, or variant by variant; of each as they came."""
        by_variant = self._slips.get(split, {})
        for name in list(by_variant) if variant is None else [variant]:
            for slip in by_variant.get(name, ()):
                yield from self._spool.read(slip)

    def baseline(self, split: Split, variant: str, examples: Collection[str]) -> Tally | None:
        """The tally of a variant on these examples; None where it failed or has not answered all of them."""
        tally = self.tallies.get(split, {}).get(variant)
        if tally is None or tally.error:
            return None
        mine = [outcome for outcome in self.outcomes(split, variant) if outcome.example in examples]
        return Tally.of(mine, tally.seconds) if len(mine) == len(examples) else None

    def scores(self, split: Split, variant: str, examples: Sequence[str]) -> Scores | None:
        """On each of these examples, in their order: whether it is right, or minus its loss. None where it failed or has not
        answered all."""
        mine = {outcome.example: outcome for outcome in self.outcomes(split, variant)}
        if not all(example in mine for example in examples):
            return None
        found = [mine[example] for example in examples]
        if any(outcome.loss is not None for outcome in found):
            return np.array([outcome.score for outcome in found], dtype=np.float64)
        return np.array([outcome.correct for outcome in found], dtype=np.bool_)

    def completions(self, split: Split, variant: str) -> dict[str, str]:
        """Example → completion."""
        return {outcome.example: outcome.completion for outcome in self.outcomes(split, variant)}


def add_shard(tally: Tally | None, shard: VariantShard) -> Tally:
    """The tally with one more shard; the first error stays."""
    part = replace(Tally.of(shard.outcomes, shard.seconds), error=shard.error)
    if tally is None:
        return part
    names = ("n", "correct", "seconds", "parsed", "cut_off", "losses")
    sums = {name: getattr(tally, name) + getattr(part, name) for name in names}
    return Tally(**sums, error=tally.error or part.error)
