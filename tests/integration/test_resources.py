"""Where models run must not change what comes out: two GPUs, one GPU, halves of one; and what a cluster cannot give is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import ray
from integration.helpers import Job, Place, Swept, free_port, run_main, timeless

from transplant_ray.distributed.cluster import connect
from transplant_ray.errors import ResourceError
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.pipeline.job import prepare
from transplant_ray.probe.rankers import Evidence, lae, read_rankings
from transplant_ray.probe.statistics import ActivationStats, stream_stats
from transplant_ray.recipe import ResourceSpec, load_recipe


def test_source_and_target_are_on_different_gpus_where_there_are_two(swept: Swept) -> None:
    places = swept.summary["places"]
    assert {role: len(place["gpus"]) for role, place in places.items()} == {"source": 1, "target": 1}
    assert places["source"]["gpus"] != places["target"]["gpus"]


@pytest.mark.slow
def test_on_one_gpu_the_models_take_turns_and_the_results_are_the_same(submitted: tuple[Job, Swept], swept: Swept) -> None:
    _, alone = submitted
    places = alone.summary["places"]
    assert places["source"]["gpus"] == places["target"]["gpus"] != []
    assert places["source"]["pid"] != places["target"]["pid"]
    pd.testing.assert_frame_equal(timeless(alone.results), timeless(swept.results))  # one evaluator there, two here


@pytest.mark.slow
def test_the_same_recipe_again_gives_the_same_completions(submitted: tuple[Job, Swept], swept: Swept) -> None:
    _, again = submitted
    assert again.summary["recipe"] == swept.summary["recipe"]
    for split in ("select", "test"):
        tables = [pd.read_parquet(run.folder / "outcomes" / f"{split}.parquet") for run in (again, swept)]
        ours, theirs = (table.sort_values(["variant", "example"], ignore_index=True) for table in tables)
        pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.slow
def test_a_model_over_two_gpus_is_ranked_along_the_reference_as_by_hand(cluster: None, place: Place) -> None:  # noqa: ARG001
    # Both models want both GPUs, so they take turns; by hand, there is no Ray at all.
    overrides = ["rank.trajectory=reference", "resources.gpus_per_model=2"]
    path = place.recipe()
    finished = run_main("rank", path, *overrides)
    assert finished.code == 0, finished.err
    rows = pd.read_parquet(place.path / "runs" / "tiny" / "rankings.parquet").to_dict("records")
    (ranking,) = read_rankings(rows)
    assert ranking.scores == pytest.approx(scores_by_hand(path, overrides), rel=1e-5)
    assert ranking.order[0] in finished.out


def scores_by_hand(path: Path, overrides: list[str]) -> dict[str, float]:
    job = prepare(load_recipe(path, overrides))
    texts = {example.id: example.answer_ids for example in job.examples["probe"]}
    statistics = []
    for checkpoint in (job.comparison.source, job.comparison.target):
        loaded = load_model(checkpoint, "float32"), load_tokenizer(checkpoint)
        names = [module.name for module in job.comparison.modules]
        parts = stream_stats(*loaded, job.examples["probe"], names, job.probe_settings, texts)
        statistics.append(ActivationStats.merge(list(parts)))
    return dict(lae(Evidence(job.comparison.modules, 0, *statistics)).scores)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["resources.gpus_per_model=3"], "1 evaluators with 3 GPUs"),
        (["resources.gpus_per_model=1", "resources.evaluators=3"], "3 evaluators with 1 GPUs"),
        (["resources.cpus_per_model=64"], "1 evaluators with 0 GPUs and 64 CPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused_at_once(cluster: None, place: Place, overrides: list[str], found: str) -> None:  # noqa: ARG001
    actors = len(ray.util.list_named_actors())
    finished = run_main("sweep", place.recipe(), *overrides)
    assert finished.code == 2
    assert f"ResourceError: `resources`: {found}" in finished.err
    assert "2 GPUs and 4 CPUs" in finished.err
    assert "Lower `evaluators`, `gpus_per_model` or `cpus_per_model`, join a larger cluster with `address`" in finished.err
    assert not (place.path / "runs").exists()
    assert len(ray.util.list_named_actors()) == actors


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_a_cluster_that_nobody_answers_for_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    # Ray itself waits for minutes, then ends the process: so nothing may reach `ray.init`.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("ray.init was left to find out"))
    port = free_port()
    with pytest.raises(ResourceError, match=rf"`resources.address`: no Ray cluster at .*{port}.*ray start --head"):
        connect(ResourceSpec(address=address.format(port=port))).__enter__()


def test_a_ray_that_does_not_come_up_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # Ray's own words and class

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(ResourceError, match=r"Ray did not start on this machine \(The current node timed out.*Try again"):
        connect(ResourceSpec()).__enter__()
