"""Nobody is asked twice: a variant answers what it has not answered, and one that failed is left alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny import tiny_pair

from transplant_ray.distributed.pool import Pool, Work
from transplant_ray.errors import RunError
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.asking import ask
from transplant_ray.pipeline.run import Memory, Run, remember
from transplant_ray.pipeline.watch import Silent, Stopwatch
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder

EXAMPLES = tuple(Rendered(f"e{i}", (1, i), (2,), "x") for i in range(10))
RULES = Rules(GenerationSettings(4, (2,)), "exact")
NEW, RACED, WHOLE, FAILED = (Variant({name: 1.0}) for name in ("new", "raced", "whole", "failed"))


def answered(variant: Variant, examples: Any) -> VariantShard:
    return VariantShard(variant.id, tuple(Outcome(variant.id, e.id, "x", True, 1, True) for e in examples), 1.0)


def make_run(memory: Memory | None = None, *, begun: bool = True) -> tuple[Run, Answers]:
    answers = Answers()
    if begun:
        answers.add("select", answered(RACED, EXAMPLES[:4]))
        answers.add("select", answered(WHOLE, EXAMPLES))
        answers.add("select", VariantShard(FAILED.id, (), 0.0, "NumericsError: NaN"))
    task = SimpleNamespace(examples={"select": EXAMPLES}, rules=RULES)
    job = SimpleNamespace(tasks={"task": task}, recipe=SimpleNamespace(resources=SimpleNamespace(shard_size=3)))
    run = SimpleNamespace(
        job=job,
        memory=memory,
        tally=lambda name, split, variant: answers.tallies.get(split, {}).get(variant),  # noqa: ARG005
        take=lambda name, split, shard: answers.add(split, shard),  # noqa: ARG005
    )
    return cast(Run, run), answers


@dataclass
class FakePool:
    """Answers everything, and dies after so many units."""

    units: list[Work] = field(default_factory=list)
    most: int = 1000

    def run(self, work: Any, on_result: Any, _on_tick: Any) -> None:
        unit: Work
        for unit in work:
            assert unit.rules == RULES
            if len(self.units) == self.most:
                raise KeyboardInterrupt
            self.units.append(unit)
            for variant in unit.variants:
                on_result(answered(variant, unit.examples))


def test_each_answers_what_is_left_in_order() -> None:
    run, answers = make_run()
    ask(run, cast(Pool, FakePool()), "task", "select", [NEW, RACED, WHOLE, FAILED, NEW, RACED])
    for variant in (NEW, RACED, WHOLE):
        said = [o.example for o in answers.outcomes("select", variant.id)]
        assert said == [example.id for example in EXAMPLES]
        assert answers.tallies["select"][variant.id].n == len(EXAMPLES)
    assert answers.tallies["select"][FAILED.id].error == "NumericsError: NaN"
    assert answers.tallies["select"][FAILED.id].n == 0


def memory(folder: Path) -> Memory:
    """As another process opens it."""
    return Memory(Ledger(Shelf(str(folder)), lambda _: None), ("source", "target"), "float32")


def said(answers: Answers, variant: Variant) -> set[Outcome]:
    return set(answers.outcomes("select", variant.id))


@pytest.mark.parametrize("most", range(5))
def test_a_run_that_died_goes_on_where_it_stopped(tmp_path: Path, most: int) -> None:
    """Whatever it had evaluated is recalled, the rest is evaluated, and all of it is what a calm run says."""
    calm, first, second = FakePool(), FakePool(most=most), FakePool()
    run, expected = make_run(begun=False)
    ask(run, cast(Pool, calm), "task", "select", [NEW, WHOLE])
    remembered = memory(tmp_path)
    run, _ = make_run(remembered, begun=False)
    if most < len(calm.units):
        with pytest.raises(KeyboardInterrupt):
            ask(run, cast(Pool, first), "task", "select", [NEW, WHOLE])
    run, found = make_run(memory(tmp_path), begun=False)
    ask(run, cast(Pool, second), "task", "select", [NEW, WHOLE])
    assert [said(found, variant) for variant in (NEW, WHOLE)] == [said(expected, variant) for variant in (NEW, WHOLE)]
    units = [*first.units, *second.units]
    asked = [(variant.id, example.id) for unit in units for variant in unit.variants for example in unit.examples]
    assert len(asked) == len(set(asked)) == 2 * len(EXAMPLES)


def test_another_recipe_asks_only_what_is_new(tmp_path: Path) -> None:
    run, _ = make_run(memory(tmp_path), begun=False)
    ask(run, cast(Pool, FakePool()), "task", "select", [NEW])
    run, found = make_run(memory(tmp_path), begun=False)
    pool = FakePool()
    ask(run, cast(Pool, pool), "task", "select", [NEW, WHOLE])
    assert {variant.id for unit in pool.units for variant in unit.variants} == {WHOLE.id}
    assert found.tallies["select"][NEW.id].n == len(EXAMPLES)


def remembered(folder: Path, comparison: Any) -> Memory:
    """As a run has it that starts now: it looks at the weights again."""
    recipe = SimpleNamespace(ledger=True, resources=SimpleNamespace(dtype="float32"))
    job = SimpleNamespace(comparison=comparison, recipe=recipe)
    run = remember(Run(cast(Any, job), RunFolder(folder / "run"), Stopwatch(Silent()), {}, cast(Any, None)))
    assert run.memory is not None
    return run.memory


@pytest.mark.parametrize("place", ["source", "target"])
def test_one_changed_byte_of_weights_makes_everything_new(tmp_path: Path, place: str) -> None:
    """Real checkpoints on disk; the ledger knows what they said before, and says none of it of those that they are now."""
    comparison = tiny_pair(tmp_path / "pair")
    (weights,) = (tmp_path / "pair" / place).glob("*.safetensors")

    def asked() -> int:
        run, found = make_run(remembered(tmp_path, comparison), begun=False)
        pool = FakePool()
        ask(run, cast(Pool, pool), "task", "select", [NEW, WHOLE])
        assert all(found.tallies["select"][variant.id].n == len(EXAMPLES) for variant in (NEW, WHOLE))
        return sum(len(unit.variants) * len(unit.examples) for unit in pool.units)

    before = weights.read_bytes()
    assert [asked(), asked()] == [2 * len(EXAMPLES), 0]
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert [asked(), asked()] == [2 * len(EXAMPLES), 0]
    weights.write_bytes(before)
    assert asked() == 0


def run_in(path: Path) -> Run:
    recipe = SimpleNamespace(identity=lambda: "identity", to_yaml=lambda: "name: run\n")
    journal = SimpleNamespace(kept=lambda *_: nullcontext())
    return Run(cast(Any, SimpleNamespace(recipe=recipe)), RunFolder(path), Stopwatch(Silent()), {}, cast(Any, journal))


def test_no_state_of_tune_outlives_a_run(tmp_path: Path) -> None:
    """Neither that of the run itself, whatever ends it, nor what a killed one has left."""
    run = run_in(tmp_path / "run")
    folder = run.folder

    def leave_state() -> None:
        folder.tune.mkdir(parents=True)
        (folder.tune / "experiment_state.pkl").write_bytes(b"pickled")

    def die() -> None:
        with run.claimed("sweep"):
            assert not folder.tune.exists()
            leave_state()
            raise KeyboardInterrupt

    leave_state()
    with pytest.raises(KeyboardInterrupt):
        die()
    assert not folder.tune.exists()
    assert folder.recipe.exists()


def test_the_same_recipe_twice_at_once_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "run"), run_in(tmp_path / "run")
    with first.claimed("sweep"):
        first.folder.tune.mkdir()
        with pytest.raises(RunError, match="another process works in it"), second.claimed("sweep"):
            pytest.fail("the block must not run")
        assert first.folder.tune.exists()
    with second.claimed("sweep"):
        assert not first.folder.tune.exists()
