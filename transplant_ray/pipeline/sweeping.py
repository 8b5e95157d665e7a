"""`rank` and `sweep`: probe, rank, plan, evaluate, choose, export, confirm, record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transplant_ray import zoo
from transplant_ray.distributed.cluster import Capacity, connect, plain_errors
from transplant_ray.distributed.pool import evaluator_pool, feeding, plan_work
from transplant_ray.distributed.probing import ProbePlan, ProbeResult, answer_alone, num_probe_steps, run_probe
from transplant_ray.distributed.trials import Trials
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.results import Result, choose_winner
from transplant_ray.evaluate.task import Rendered, Split
from transplant_ray.graft.export import describe_variant
from transplant_ray.graft.plan import SweepPlan, check_orders, plan_sweep
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.pipeline.exporting import export_winner
from transplant_ray.pipeline.recording import EXPORTED, SweepResult, Trial, record
from transplant_ray.pipeline.run import Run, begin
from transplant_ray.pipeline.watch import Watch
from transplant_ray.probe.rankers import SCHEMA as RANKING_SCHEMA
from transplant_ray.probe.rankers import Ranking, ranking_rows
from transplant_ray.recipe import Recipe, load_recipe
from transplant_ray.storage import write_rows
from transplant_ray.tracking.tracker import Tracker, tracked

MEASURED: tuple[Split, ...] = ("select", "test")


def demo(pair: str = zoo.PAIRS[0], overrides: Sequence[str] = (), watch: Watch | None = None) -> SweepResult:
    """Sweep a pair of the zoo by its own recipe."""
    return sweep(load_recipe(zoo.recipe_path(pair), overrides), watch)


def rank(recipe: Recipe, watch: Watch | None = None) -> list[Ranking]:
    """Rank the modules of a pair and write rankings.parquet; nothing is grafted."""
    run = begin(recipe, watch)
    with plain_errors(), connect(recipe.resources) as capacity:
        run.folder.claim(recipe.identity(), recipe.to_yaml())
        return _probe(run, capacity, baselines={}).rankings


def sweep(recipe: Recipe, watch: Watch | None = None) -> SweepResult:
    """The main job, end to end. Raises before anything is started where the recipe cannot work; variants that fail are rows."""
    run = begin(recipe, watch)
    with plain_errors(), tracked(recipe) as tracker, connect(recipe.resources) as capacity:
        run.folder.claim(recipe.identity(), recipe.to_yaml())
        probed = _probe(run, capacity, {split: run.job.examples[split] for split in MEASURED})
        for split, shard in probed.source.items():
            run.answers.add(split, shard)
        plan = _plan(run, probed.rankings)
        trials = _evaluate(run, plan, capacity, tracker)
        results = _select_rows(run, plan, trials)
        winner = choose_winner(results)
        if winner is not None:
            results = [replace(row, winner=(row.role, row.label) == ("trial", winner.label)) for row in results]
            results += _confirm(run, plan, winner, capacity)
        return record(run, plan, results, probed, trials, tracker)


def _probe(run: Run, capacity: Capacity, baselines: Mapping[Split, Sequence[Rendered]]) -> ProbeResult:
    job = run.job
    plan = ProbePlan(
        rankers=job.recipe.rank.by,
        activations=job.activations,
        trajectory=job.recipe.rank.trajectory,
        settings=job.probe_settings,
        probe=job.examples["probe"],
        baselines=baselines,
        seed=job.recipe.task.split.seed,
    )
    with run.stopwatch.stage("probe and rank", num_probe_steps(plan)):
        probed = run_probe(job.comparison, plan, run.workload, capacity, run.stopwatch.watch.advance)
    write_rows(run.folder.rankings, ranking_rows(probed.rankings, job.comparison.modules), RANKING_SCHEMA)
    return probed


def _plan(run: Run, rankings: Sequence[Ranking]) -> SweepPlan:
    modules = run.job.comparison.modules
    orders = {ranking.ranker: ranking.order for ranking in rankings}
    check_orders(orders, modules)
    plan = plan_sweep(modules, orders, run.job.recipe.sweep)
    for note in plan.notes:
        run.stopwatch.watch.note(note)
    return plan


def _evaluate(run: Run, plan: SweepPlan, capacity: Capacity, tracker: Tracker) -> dict[str, Trial]:
    """All variants on select while Tune's trials wait for theirs, then the baselines on test. Returns trials by label."""
    job, resources = run.job, run.job.recipe.resources
    reported: dict[str, Trial] = {}
    trials = Trials(plan.trials)
    unposted = list(plan.trials)

    def on_select(shard: VariantShard) -> None:
        _take(run, "select", shard)
        for entry in [entry for entry in unposted if run.is_complete(entry.id) and run.is_complete(ORIGIN.id)]:
            unposted.remove(entry)
            trials.post(run.row(entry, "select", run.answers.tallies["select"][entry.id]))

    def on_trial(result: Result) -> None:
        description = describe_variant(job.comparison, plan.trial(result.label).variant)
        reported[result.label] = Trial(result, tracker.log_trial(result, description))

    with evaluator_pool(job.comparison, frozenset(run.modules), run.workload, capacity, resources.evaluators) as pool:
        with run.stopwatch.stage("evaluate", len(plan.variants) * len(job.examples["select"])):
            work = list(plan_work(plan.variants, job.examples["select"], resources.shard_size))
            with feeding(pool, work, on_select, on_failure=trials.fail):
                trials.run(run.folder.path / ".tune", on_trial)
        baselines = [entry.variant for entry in plan.entries if entry.role in ("target", "all")]
        with run.stopwatch.stage("baselines on test", len(baselines) * len(job.examples["test"])):
            work = list(plan_work(baselines, job.examples["test"], resources.shard_size))
            pool.run(work, lambda shard: _take(run, "test", shard))
    return reported


def _take(run: Run, split: Split, shard: VariantShard) -> None:
    run.answers.add(split, shard)
    run.stopwatch.watch.advance(len(shard.outcomes))


def _select_rows(run: Run, plan: SweepPlan, trials: Mapping[str, Trial]) -> list[Result]:
    """One row per planned variant. A trial that reported nothing is a failed row, whatever the evaluator saw."""
    rows = []
    for entry in plan.entries:
        tally = run.answers.tallies["select"][entry.id]
        if entry.role == "trial" and entry.label not in trials:
            tally = replace(tally, error=tally.error or "its trial ended without reporting")
        reported = trials.get(entry.label) if entry.role == "trial" else None
        rows.append(reported.result if reported else run.row(entry, "select", tally))
    return rows


def _confirm(run: Run, plan: SweepPlan, winner: Result, capacity: Capacity) -> list[Result]:
    """Export the winner, reload it, let it answer: what a checkpoint is said to reach is measured on the checkpoint.

    Returns the rows of the test split: the baselines and the winner.
    """
    planned = plan.trial(winner.label)
    with run.stopwatch.stage("export"):
        export_winner(run.job.recipe, run.job.comparison, planned, [winner], run.folder)
    exported = open_checkpoint(str(run.folder.checkpoint), accept=run.job.recipe.accept)
    with run.stopwatch.stage("confirm", sum(len(run.job.examples[split]) for split in MEASURED)):
        splits = {split: run.job.examples[split] for split in MEASURED}
        for split, shard in answer_alone(exported, EXPORTED, splits, run.workload, capacity).items():
            _take(run, split, shard)
    tallies = run.answers.tallies["test"]
    rows = [run.row(entry, "test", tallies[entry.id]) for entry in plan.entries if entry.role in ("target", "source", "all")]
    return [*rows, replace(run.row(planned, "test", tallies[EXPORTED]), winner=True)]
