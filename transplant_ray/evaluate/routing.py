"""Rows of a pack: which variant each belongs to, and whose the seconds were."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transplant_ray.evaluate.example import Rendered
from transplant_ray.graft.resident import ResidentPair
from transplant_ray.graft.routed import Router
from transplant_ray.graft.variant import Variant


@dataclass(frozen=True)
class Request:
    """One row: a variant, by its place in the pack, on an example."""

    variant: int
    example: Rendered


class Routed:
    """The router of a pack, and whose rows the seconds went to."""

    def __init__(self, pair: ResidentPair, pack: Sequence[Variant]) -> None:
        self.router = Router(pair, pack)
        self.num_variants = len(pack)
        self.in_flight: Counter[int] = Counter()
        self.spent: dict[int, float] = defaultdict(float)
        self.since = time.perf_counter()

    def __enter__(self) -> Routed:
        self.router.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.router.release()

    def by(self, requests: Sequence[Request]) -> Callable[[Sequence[int]], None]:
        """Routes rows that are given as indices of `requests`."""

        return lambda indices: self.assign([requests[index].variant for index in indices])

    def assign(self, variants: Sequence[int]) -> None:
        """Routes rows by the places of their variants in the pack; −1 is the last."""
        places = [variant % self.num_variants for variant in variants]
        self._settle()
        self.in_flight = Counter(places)
        self.router.assign(places)

    def seconds(self, variant: int) -> float:
        self._settle()
        return self.spent[variant]

    def _settle(self) -> None:
        """Share the time since the last call among the rows in flight."""
        now = time.perf_counter()
        for variant, rows in self.in_flight.items():
            self.spent[variant] += (now - self.since) * rows / self.in_flight.total()
        self.since = now


def requests_of(pack: Sequence[Variant], examples: Sequence[Rendered]) -> list[Request]:
    """Variant by variant, so that few are in flight at a time; short prompts first, so that little is padding."""
    by_length = sorted(examples, key=lambda example: len(example.prompt_ids))
    return [Request(place, example) for place in range(len(pack)) for example in by_length]
