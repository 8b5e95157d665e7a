"""The arms of a sweep: random sets that are chosen from as the trials were, and answer on test what the winner answers."""

from __future__ import annotations

from collections.abc import Sequence

from transplant_ray.distributed.pool import Pool, plan_work
from transplant_ray.evaluate.arms import Arms, choose
from transplant_ray.evaluate.example import Split
from transplant_ray.graft.plan import Planned, num_parameters
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.run import Run


def evaluate_arms(run: Run, arms: Sequence[Sequence[Planned]], pool: Pool) -> Arms:
    """Every arm chooses on select, where it has a choice, and what it chose answers on test.

    A set that fails cannot be chosen; an arm whose sets all failed, or whose choice failed on test, is left out and named.
    """
    sets_each = len(arms[0])
    if sets_each > 1:
        _answer(run, "select", [entry.variant for arm in arms for entry in arm], pool)
        chosen = [choice for arm in arms if (choice := _choose(run, arm)) is not None]
    else:
        chosen = [entry for arm in arms for entry in arm]
    _answer(run, "test", [entry.variant for entry in chosen], pool)
    tallies = [run.answers.tallies["test"][entry.id] for entry in chosen]
    correct = tuple(tally.correct for tally in tallies if tally.error is None)
    if len(correct) < len(arms):
        run.stopwatch.watch.note(f"arms: {len(arms) - len(correct)} of {len(arms)} failed and are left out")
    return Arms(correct, sets_each)


def _answer(run: Run, split: Split, variants: Sequence[Variant], pool: Pool) -> None:
    """Those that have not answered this split yet, each once."""
    examples = run.job.examples[split]
    known = run.answers.tallies.get(split, {})
    new = {v.id: v for v in variants if v.id not in known or (known[v.id].error is None and known[v.id].n < len(examples))}
    with run.stopwatch.stage(f"arms on {split}", len(new) * len(examples)):
        work = plan_work(list(new.values()), examples, run.job.recipe.resources.shard_size)
        pool.run(work, lambda shard: run.take(split, shard))


def _choose(run: Run, arm: Sequence[Planned]) -> Planned | None:
    tallies = run.answers.tallies["select"]
    whole = [entry for entry in arm if tallies[entry.id].error is None]
    if not whole:
        return None
    accuracies = [tallies[entry.id].accuracy for entry in whole]
    parameters = [num_parameters(entry.variant, run.modules) for entry in whole]
    return whole[choose(accuracies, [entry.k or 0 for entry in whole], parameters, len(run.job.examples["select"]))]
