"""Evaluators that die: their work is done by others, and a variant that kills whoever has it is given up with that reason."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from integration.helpers import Place, Swept, run_main
from mlflow import MlflowClient

from transplant_ray.distributed.cluster import RETRIES
from transplant_ray.distributed.fleet import fleet
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.pool import MOST_DEATHS, MOST_NODES, Pool, Work, _Measuring, packed
from transplant_ray.distributed.probing import released
from transplant_ray.distributed.trials import _TrialListener
from transplant_ray.errors import DeviceError, ResourceError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft.variant import Variant

RULES = Rules(GenerationSettings(4, (2,)), "exact")
EXAMPLES = tuple(Rendered(f"e{i}", (1, i), (2,), "x") for i in range(4))
VARIANTS = [Variant({f"module{i}": 1.0}) for i in range(40)]


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)
class Mortal:
    """Answers, and dies over some variants: `always`, or the first time, for which it leaves a mark on disk."""

    def __init__(self, marks: Path, always: frozenset[str], once: frozenset[str]) -> None:
        self.marks, self.always, self.once = marks, always, once

    def join(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def evaluate(
        self, variants: Sequence[Variant], examples: Sequence[Rendered], _rules: Rules, _rows: int
    ) -> Iterator[VariantShard]:
        for variant in variants:
            self._live_or_die(variant.id)
            yield VariantShard(variant.id, tuple(Outcome(variant.id, e.id, "x", True, 1, True) for e in examples), 1.0)

    def losses(self, variants: Sequence[Variant], *_: Any) -> Iterator[dict[str, float]]:
        for variant in variants:
            self._live_or_die(variant.id)
        yield {variant.id: 1.0 for variant in variants}

    def _live_or_die(self, variant: str) -> None:
        time.sleep(0.01)
        mark = self.marks / variant
        if variant in self.always or (variant in self.once and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), 9)


@contextmanager
def make_pool(folder: Path, *, always: Sequence[Variant] = (), once: Sequence[Variant] = (), size: int = 2) -> Iterator[Pool]:
    dying = [frozenset(variant.id for variant in some) for some in (always, once)]
    with fleet(lambda _: Mortal.remote(folder, *dying), lambda _: size, Overseer(), print) as gathered:  # type: ignore[attr-defined]
        yield Pool(gathered, rows=8)


def run(pool: Pool) -> tuple[Counter[str], dict[str, str]]:
    """How often each variant was answered, and the reasons of those that were not."""
    shards: list[VariantShard] = []
    pool.run([Work(pack, EXAMPLES, RULES) for pack in packed(VARIANTS)], shards.append)
    failed = {shard.variant: shard.error for shard in shards if shard.error is not None}
    return Counter(shard.variant for shard in shards if shard.error is None), failed


def test_what_a_dead_evaluator_had_in_hand_is_done_once_by_another(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    """The first and the last of a pack, and one in the middle of the next."""
    with make_pool(tmp_path, once=[VARIANTS[0], VARIANTS[15], VARIANTS[25]]) as pool:
        done, failed = run(pool)
    assert done == dict.fromkeys((variant.id for variant in VARIANTS), 1)
    assert not failed


@pytest.mark.slow
def test_a_variant_that_kills_whoever_has_it_is_given_up(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    killer = VARIANTS[5]
    with make_pool(tmp_path, always=[killer]) as pool:
        done, failed = run(pool)
    assert failed == {killer.id: f"its evaluator died {MOST_DEATHS} times, or {MOST_NODES} times with its node, while it answered"}
    assert done == dict.fromkeys((variant.id for variant in VARIANTS if variant != killer), 1)


@pytest.mark.slow
def test_a_measurement_of_a_killer_is_nothing(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    killer = VARIANTS[5]
    with make_pool(tmp_path, always=[killer], once=VARIANTS[20:21]) as pool:
        losses: dict[str, float | None] = {}
        pool.losses(VARIANTS, EXAMPLES, RULES, losses.update)
    assert losses == {variant.id: None if variant == killer else 1.0 for variant in VARIANTS}


@ray.remote(max_restarts=-1, num_cpus=0)
class Stillborn(Mortal.__ray_metadata__.modified_class):  # type: ignore[name-defined, misc]
    """Dies whenever it loads, as where a model is larger than the memory."""

    def join(self) -> str:
        os.kill(os.getpid(), 9)
        return ""


@ray.remote(max_restarts=-1, num_cpus=0)
class Sick(Mortal.__ray_metadata__.modified_class):  # type: ignore[name-defined, misc]
    """Its device fails over a variant, the first time, and from then on at all that it is asked."""

    def _live_or_die(self, variant: str) -> None:
        time.sleep(0.01)
        mark = self.marks / variant
        self.sick = getattr(self, "sick", False) or (variant in self.once and not mark.exists())
        if self.sick:
            mark.touch()
            raise DeviceError("cuda:0 no longer computes")


def test_what_a_device_fails_at_is_done_by_another_and_by_a_new_process(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    notes: list[str] = []
    sick = frozenset(variant.id for variant in (VARIANTS[0], VARIANTS[20]))
    with fleet(lambda _: Sick.remote(tmp_path, frozenset(), sick), lambda _: 2, Overseer(), notes.append) as gathered:  # type: ignore[attr-defined]
        done, failed = run(Pool(gathered, rows=8))
    assert (set(done.values()), len(done), failed) == ({1}, len(VARIANTS), {})
    assert all("no longer computes" in note for note in notes)
    assert notes


@pytest.mark.slow
def test_where_all_die_while_they_load_that_is_the_end(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    notes: list[str] = []
    actors = (Stillborn.remote(tmp_path, frozenset(), frozenset()) for _ in range(9))  # type: ignore[attr-defined]
    with (
        fleet(lambda _: next(actors), lambda _: 2, Overseer(), notes.append) as gathered,
        pytest.raises(ResourceError, match=rf"died {RETRIES + 1} times while it loaded; memory may have run out\. Give it"),
    ):
        gathered.work_through([_Measuring(EXAMPLES, RULES)])
    assert len(notes) == 1, "that the first is left out"


@pytest.mark.slow
def test_one_that_dies_while_it_loads_is_left_out_and_the_others_work(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    well, ill = (kind.remote(tmp_path, frozenset(), frozenset()) for kind in (Mortal, Stillborn))  # type: ignore[attr-defined]
    actors, notes = iter([well, ill]), list[str]()
    with fleet(lambda _: next(actors), lambda _: 2 - len(notes), Overseer(), notes.append) as gathered:
        done, failed = run(Pool(gathered, rows=8))
        while not notes:
            gathered.welcome(ray.wait(list(gathered.joining), num_returns=1)[0][0])
    assert (set(done.values()), failed, len(notes)) == ({1}, {}, 1)


def test_a_model_that_ends_whoever_loads_it_is_an_error_of_ours(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    actor = Stillborn.options(max_task_retries=1).remote(tmp_path, frozenset(), frozenset())  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="died again and again, while it loaded or at work"), released(actor):
        ray.get(actor.join.remote())


def test_an_error_of_an_evaluator_is_no_death(cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    with make_pool(tmp_path) as pool, pytest.raises(ray.exceptions.RayTaskError, match="has no attribute 'id'"):
        pool.run([Work((VARIANTS[0],), (None,), RULES)], lambda _: None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_trial_that_tune_gave_up_has_its_result_all_the_same(
    cluster: None,  # noqa: ARG001
    template: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = _TrialListener.on_trial_complete

    def lose_the_first(self: _TrialListener, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.last_result["result"]["k"] != 2:
            heard(self, iteration, trials, trial, **info)

    monkeypatch.setattr(_TrialListener, "on_trial_complete", lose_the_first)
    place = template.copy(tmp_path)
    finished = run_main("sweep", place.recipe(name="lost", sweep={"k": [2, 6], "kind": ["all"]}))
    assert finished.code == 0, finished.err
    swept = Swept(place.path / "runs" / "lost", place, finished)
    notes = " ".join(f"{finished.out} {finished.err}".split())
    assert "trials that Ray Tune gave up, for their processes died: 1; their results are known" in notes
    trials = swept.results[swept.results["role"] == "trial"].drop_duplicates("k").set_index("k")
    assert set(trials.index) == {2, 6}
    assert trials["score"].notna().all()
    assert trials["error"].isna().all()
    runs = MlflowClient(tracking_uri=place.uri).search_runs(
        [MlflowClient(tracking_uri=place.uri).get_run(swept.summary["mlflow_run"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{swept.summary['mlflow_run']}'",
    )
    assert {run.data.params["k"] for run in runs} == {"2", "6"}
