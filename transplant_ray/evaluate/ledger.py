"""The ledger: every outcome once, under the content of what it came of; what is in it is not evaluated again.

A *page* is one way of asking one pair: weights, dtype, limits, scorer, our own code and the versions of the
libraries that decide. On a page an outcome
has the id of its variant and the hash of what the variant was asked. Whatever of it changes, the key changes: nothing is stale.

A page is kept in parts (`parts.py`). A damaged one is set aside, said, and what it held is evaluated again. Of an open page only
who was asked what is in memory; the outcomes are in a spool.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

from transplant_ray.errors import RunError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Rules
from transplant_ray.evaluate.harness_process import HARNESS, JudgeSpec
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.parts import MANY, SCHEMA, Part, merge_parts, read_parts, write_part
from transplant_ray.evaluate.results import OUTCOME_SCHEMA
from transplant_ray.evaluate.spool import Slip, Spool
from transplant_ray.shelf import Shelf
from transplant_ray.versions import DECIDING, public_version, versions

FORMAT = 1
PART_OUTCOMES = 4096
PART_SECONDS = 5.0
"""A part is written when it holds so many outcomes, or so much time has passed since the last: what a killed driver loses."""
BESIDE = {"asked", "seconds"}
"""Columns of a part that are not of the outcome."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Outcomes of one variant on a page."""

    asked: tuple[str, ...]
    """What it was asked, one for each outcome; variants that were asked the same share it."""
    slip: Slip
    seconds: float
    """That each outcome took."""


Page = dict[str, list[Kept]]
"""Variant → what is known of it; nothing twice."""


def page_key(weights: Sequence[str], dtype: str, rules: Rules) -> str | None:
    """The name of a page. None for a task of the harness in a file of somebody's, which may say other things tomorrow.

    Those that come with the library change with its version.
    """
    if rules.scorer.startswith(HARNESS) and JudgeSpec.of(rules.scorer).is_somebodys:
        return None
    generation = rules.generation
    content = [
        FORMAT,
        list(weights),
        dtype,
        generation.max_new_tokens,
        generation.end_ids,
        generation.stop,
        rules.scorer,
        _versions(),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def asked(example: Rendered) -> str:
    """Hash of everything that a model is given of an example, and that it is judged by."""
    parts = [_tokens(part) for part in (example, *example.choices)]
    content = json.dumps([parts, example.doc], default=str, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _tokens(example: Rendered) -> list[Any]:
    return [example.prompt_ids, example.answer_ids, example.answer]


@lru_cache
def _versions() -> list[str]:
    """Of our own code by its text, of libraries as they are published."""
    return [public_version(version) for version in versions(DECIDING).values()]


class Ledger:
    """The pages under one storage, as one driver reads and writes them."""

    def __init__(self, shelf: Shelf, note: Callable[[str], None]) -> None:
        """`note` is told of damaged parts."""
        self.shelf, self.note = shelf, note
        self.pages: dict[str, Page] = {}
        self.marks: dict[int, tuple[Rendered, str]] = {}
        """By identity: another task may ask otherwise under the same id, with more shots or another template."""
        self.orders: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.spool = Spool()
        self.unwritten: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.written_at = time.monotonic()
        self.num_recalled = 0

    def recall(self, key: str | None, variant: str, examples: Sequence[Rendered]) -> VariantShard:
        """What is known of a variant on these examples, in their order; as their outcomes, under the ids that they have today."""
        if key is None:
            return VariantShard(variant, (), 0.0)
        marks = [self._mark(example) for example in examples]
        known = self._known(self._page(key), variant, set(marks))
        found = [(example, *known[mark]) for example, mark in zip(examples, marks, strict=True) if mark in known]
        self.num_recalled += len(found)
        outcomes = tuple(replace(outcome, example=example.id) for example, outcome, _ in found)
        return VariantShard(variant, outcomes, sum(seconds for *_, seconds in found), recalled=True)

    def keep(self, key: str | None, shard: VariantShard, examples: Sequence[Rendered]) -> None:
        """Remember a shard, and write it with the next part.

        What failed is not kept, nor what was not judged in time, which another hour may judge: they are tried again.
        """
        if key is None or shard.error is not None:
            return
        marks = {example.id: self._mark(example) for example in examples}
        seconds = shard.seconds / max(1, len(shard.outcomes))
        page = self._page(key)
        said = [(marks[outcome.example], outcome) for outcome in shard.outcomes if not outcome.judged_late]
        new = _unknown(page, shard.variant, said)
        self.unwritten[key] += [{**asdict(outcome), "asked": mark, "seconds": seconds} for mark, outcome in new.items()]
        self._enter(page, shard.variant, new, seconds)  # last, for it may find no room where parts do
        self.write_if_due()

    def write_if_due(self) -> None:
        """For whoever waits: what comes in a burst is written though nothing comes after it."""
        num = sum(map(len, self.unwritten.values()))
        if num and (num >= PART_OUTCOMES or time.monotonic() - self.written_at > PART_SECONDS):
            self.write()

    def write(self) -> None:
        """Everything that is not written yet. RunError where there is no room."""
        for key in list(self.unwritten):
            if rows := self.unwritten[key]:
                write_part(self.shelf, key, pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA))
            del self.unwritten[key]  # now: where the next page finds no room, this one is not written again
        self.written_at = time.monotonic()

    def _mark(self, example: Rendered) -> str:
        if id(example) not in self.marks:
            self.marks[id(example)] = example, asked(example)  # held, so that its identity stays its own
        return self.marks[id(example)][1]

    def _known(self, page: Page, variant: str, marks: Set[str]) -> dict[str, tuple[Outcome, float]]:
        """What the variant said of these, and the seconds that it took."""
        return {
            mark: (outcome, kept.seconds)
            for kept in page.get(variant, ())
            if not marks.isdisjoint(kept.asked)
            for mark, outcome in zip(kept.asked, self.spool.read(kept.slip), strict=True)
            if mark in marks
        }

    def _enter(self, page: Page, variant: str, new: Mapping[str, Outcome], seconds: float) -> None:
        """Put on a page what is not there yet."""
        if new:
            order = tuple(new)
            order = self.orders.setdefault(order, order)
            page.setdefault(variant, []).append(Kept(order, self.spool.keep(tuple(new.values())), seconds))

    def _page(self, key: str) -> Page:
        if key not in self.pages:
            page: Page = {}
            tables = {part.name: self._fill(page, part) for part in read_parts(self.shelf, key, self.note)}
            self.pages[key] = page
            if len(tables) > MANY:
                self._merge(key, tables)
        return self.pages[key]

    def _fill(self, page: Page, part: Part) -> pa.Table:
        """Put on a page what is in a part; returns the rows that were not there before."""
        new: list[bool] = []
        for (variant, seconds), some in groupby(part.rows(), itemgetter("variant", "seconds")):
            rows = list(some)
            said = [(row["asked"], _outcome(row)) for row in rows]
            unknown = _unknown(page, variant, said)
            new += [unknown.get(mark) is outcome for mark, outcome in said]
            self._enter(page, variant, unknown, seconds)
        return part.table if all(new) else part.table.filter(pa.array(new, pa.bool_()))

    def _merge(self, key: str, tables: Mapping[str, pa.Table]) -> None:
        try:
            merge_parts(self.shelf, key, tables)
        except RunError as error:  # it was for speed
            self.note(f"ledger: the {len(tables)} parts of {key} stay as they are: {error}")


def _unknown(page: Page, variant: str, said: Iterable[tuple[str, Outcome]]) -> dict[str, Outcome]:
    """What is not on the page, by what was asked; of those that were asked the same the first."""
    known = {mark for kept in page.get(variant, ()) for mark in kept.asked}
    new: dict[str, Outcome] = {}
    for mark, outcome in said:
        if mark not in known:
            new.setdefault(mark, outcome)
    return new


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(**{name: value for name, value in row.items() if name not in BESIDE})


assert {field.name for field in fields(Outcome)} == set(OUTCOME_SCHEMA.names), "an outcome comes back from the ledger as it was"
