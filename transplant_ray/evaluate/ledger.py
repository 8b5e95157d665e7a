"""The ledger: every outcome once, under the content of what it came of; what is in it is not evaluated again.

A *page* is one way of asking one pair: weights, dtype, limits, scorer, our own code and the versions of the
libraries that decide. On a page an outcome
has the id of its variant and the hash of what the variant was asked. Whatever of it changes, the key changes: nothing is stale.

A page is kept in parts (`parts.py`). A damaged one is set aside, said, and what it held is evaluated again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
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
from transplant_ray.storage import Shelf
from transplant_ray.versions import DECIDING, OURSELVES, public_version, source_hash, versions

FORMAT = 1
PART_OUTCOMES = 4096
PART_SECONDS = 5.0
"""A part is written when it holds so many outcomes, or so much time has passed since the last: what a killed driver loses."""
BESIDE = {"asked", "seconds"}
"""Columns of a part that are not of the outcome."""

Page = dict[tuple[str, str], tuple[Outcome, float]]
"""(variant, what it was asked) → its outcome, and the seconds that it took."""


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
    libraries = versions(name for name in DECIDING if name != OURSELVES)
    return [source_hash(), *map(public_version, libraries.values())]


class Ledger:
    """The pages under one storage, as one driver reads and writes them."""

    def __init__(self, shelf: Shelf, note: Callable[[str], None]) -> None:
        """`note` is told of damaged parts."""
        self.shelf, self.note = shelf, note
        self.pages: dict[str, Page] = {}
        self.marks: dict[tuple[str, str], str] = {}
        self.unwritten: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.written_at = time.monotonic()
        self.num_recalled = 0

    def recall(self, key: str | None, variant: str, examples: Sequence[Rendered]) -> VariantShard:
        """What is known of a variant on these examples, in their order; as their outcomes, under the ids that they have today."""
        if key is None:
            return VariantShard(variant, (), 0.0)
        page = self._page(key)
        known = [(example, page[variant, mark]) for example in examples if (variant, mark := self._mark(key, example)) in page]
        self.num_recalled += len(known)
        outcomes = tuple(replace(outcome, example=example.id) for example, (outcome, _) in known)
        return VariantShard(variant, outcomes, sum(seconds for _, (_, seconds) in known), recalled=True)

    def keep(self, key: str | None, shard: VariantShard, examples: Sequence[Rendered]) -> None:
        """Remember a shard, and write it with the next part. What failed is not kept: it is tried again."""
        if key is None or shard.error is not None:
            return
        page, marks = self._page(key), {example.id: self._mark(key, example) for example in examples}
        seconds = shard.seconds / max(1, len(shard.outcomes))
        for outcome in shard.outcomes:
            mark = marks[outcome.example]
            if (shard.variant, mark) not in page:
                page[shard.variant, mark] = outcome, seconds
                self.unwritten[key].append({**asdict(outcome), "asked": mark, "seconds": seconds})
        full = sum(map(len, self.unwritten.values())) >= PART_OUTCOMES
        if full or time.monotonic() - self.written_at > PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Everything that is not written yet. RunError where there is no room."""
        for key in list(self.unwritten):
            if rows := self.unwritten[key]:
                write_part(self.shelf, key, pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA))
            del self.unwritten[key]  # now: where the next page finds no room, this one is not written again
        self.written_at = time.monotonic()

    def _mark(self, key: str, example: Rendered) -> str:
        if (key, example.id) not in self.marks:
            self.marks[key, example.id] = asked(example)
        return self.marks[key, example.id]

    def _page(self, key: str) -> Page:
        if key not in self.pages:
            page: Page = {}
            tables = {part.name: _fill(page, part) for part in read_parts(self.shelf, key, self.note)}
            self.pages[key] = page
            if len(tables) > MANY:
                self._merge(key, tables)
        return self.pages[key]

    def _merge(self, key: str, tables: Mapping[str, pa.Table]) -> None:
        try:
            merge_parts(self.shelf, key, tables)
        except RunError as error:  # it was for speed
            self.note(f"ledger: the {len(tables)} parts of {key} stay as they are: {error}")


def _fill(page: Page, part: Part) -> pa.Table:
    """Put on a page what is in a part; returns the rows that were not there before."""
    new = []
    for at, row in enumerate(part.rows):
        outcome = Outcome(**{name: value for name, value in row.items() if name not in BESIDE})
        if (key := (outcome.variant, row["asked"])) not in page:
            page[key] = outcome, row["seconds"]
            new.append(at)
    return part.table if len(new) == part.table.num_rows else part.table.take(pa.array(new, pa.int64()))


assert {field.name for field in fields(Outcome)} == set(OUTCOME_SCHEMA.names), "an outcome comes back from the ledger as it was"
