"""Reading texts with variants, for their losses and divergences: from the ledger what it knows, else from the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transplant_ray.distributed.pool import Divergences, Losses, Pool
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered, Split
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.run import Run

NOTHING_NEW = GenerationSettings(1, ())
"""Nothing is generated: limits are no part of what a number came of."""

Numbers = tuple[float | None, ...]
Keep = Callable[[Mapping[str, Numbers]], None]
Advance = Callable[[int], None]


def read_losses(run: Run, pool: Pool, variants: Sequence[Variant], examples: Sequence[Rendered], advance: Advance) -> Losses:
    """Mean token loss of every variant on these examples: one number, so to the ledger they are one text."""

    def ask(unknown: Sequence[Variant], keep: Keep) -> None:
        pool.losses(unknown, examples, run.job.rules, lambda read: keep({id: (loss,) for id, loss in read.items()}))

    all_of_them = Rendered("references", (), (), "", tuple(examples))
    return {id: loss for id, (loss,) in _read(run, "losses", variants, [all_of_them], ask, advance).items()}


def read_divergences(run: Run, pool: Pool, variants: Sequence[Variant], split: Split, advance: Advance) -> Divergences:
    """How far every variant is from the target on each passage of general text."""
    texts = run.job.passages[split]

    def ask(unknown: Sequence[Variant], keep: Keep) -> None:
        pool.divergences(unknown, texts, run.job.rules, keep)

    return _read(run, "divergences", variants, texts, ask, advance)


def _read(
    run: Run,
    what: str,
    variants: Sequence[Variant],
    texts: Sequence[Rendered],
    ask: Callable[[Sequence[Variant], Keep], None],
    advance: Advance,
) -> dict[str, Numbers]:
    """Variant id → a number for each text."""
    if run.memory is None:
        found: dict[str, Numbers] = {}
    else:
        ledger, page = run.memory.ledger, run.memory.page(Rules(NOTHING_NEW, f"read:{what}"))
        shards = {variant.id: ledger.recall(page, variant.id, texts) for variant in variants}
        found = {id: tuple(o.loss for o in shard.outcomes) for id, shard in shards.items() if len(shard.outcomes) == len(texts)}
    advance(len(found))

    def keep(read: Mapping[str, Numbers]) -> None:
        found.update(read)
        advance(len(read))
        for id, numbers in read.items():
            if run.memory is not None and None not in numbers:
                pairs = zip(texts, numbers, strict=True)
                outcomes = tuple(Outcome(id, text.id, "", False, 0, True, loss=number) for text, number in pairs)
                ledger.keep(page, VariantShard(id, outcomes, 0.0), texts)
        if run.memory is not None:
            ledger.write()  # a pack takes long, and all of it comes at once

    try:
        if unknown := [variant for variant in variants if variant.id not in found]:
            ask(unknown, keep)
    finally:
        if run.memory is not None:
            ledger.write()
    return found
