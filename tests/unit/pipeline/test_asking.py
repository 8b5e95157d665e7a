"""Nobody is asked twice: a variant answers what it has not answered, and one that failed is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from transplant_ray.distributed.pool import Pool, Work
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.asking import ask
from transplant_ray.pipeline.run import Run

EXAMPLES = tuple(Rendered(f"e{i}", (1,), (2,), "x") for i in range(10))
RULES = Rules(GenerationSettings(4, (2,)), "exact")
NEW, RACED, WHOLE, FAILED = (Variant({name: 1.0}) for name in ("new", "raced", "whole", "failed"))


def answered(variant: Variant, examples: Any) -> VariantShard:
    return VariantShard(variant.id, tuple(Outcome(variant.id, e.id, "x", True, 1, True) for e in examples), 1.0)


def make_run() -> tuple[Run, Answers]:
    answers = Answers()
    answers.add("select", answered(RACED, EXAMPLES[:4]))
    answers.add("select", answered(WHOLE, EXAMPLES))
    answers.add("select", VariantShard(FAILED.id, (), 0.0, "NumericsError: NaN"))
    task = SimpleNamespace(examples={"select": EXAMPLES}, rules=RULES)
    job = SimpleNamespace(tasks={"task": task}, recipe=SimpleNamespace(resources=SimpleNamespace(shard_size=3)))
    run = SimpleNamespace(
        job=job,
        tally=lambda name, split, variant: answers.tallies[split].get(variant),  # noqa: ARG005
        take=lambda name, split, shard: answers.add(split, shard),  # noqa: ARG005
    )
    return cast(Run, run), answers


class FakePool:
    def run(self, work: Any, on_result: Any) -> None:
        unit: Work
        for unit in work:
            assert unit.rules == RULES
            for variant in unit.variants:
                on_result(answered(variant, unit.examples))


def test_each_answers_what_is_left_in_order() -> None:
    run, answers = make_run()
    ask(run, cast(Pool, FakePool()), "task", "select", [NEW, RACED, WHOLE, FAILED, NEW, RACED])
    for variant in (NEW, RACED, WHOLE):
        said = [o.example for o in answers.outcomes["select"] if o.variant == variant.id]
        assert said == [example.id for example in EXAMPLES]
        assert answers.tallies["select"][variant.id].n == len(EXAMPLES)
    assert answers.tallies["select"][FAILED.id].error == "NumericsError: NaN"
    assert answers.tallies["select"][FAILED.id].n == 0
