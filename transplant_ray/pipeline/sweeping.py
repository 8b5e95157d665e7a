"""`rank` and `sweep`: probe, rank, plan, evaluate, choose, export, confirm, record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from transplant_ray import zoo
from transplant_ray.distributed.cluster import Capacity, connect, plain_errors
from transplant_ray.distributed.facts import Exported, VariantsPlanned
from transplant_ray.distributed.probing import Asked, OnAnswer, ProbePlan, ProbeResult, num_probe_steps, run_probe
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.results import Result
from transplant_ray.graft.norms import write_norms
from transplant_ray.graft.plan import SweepPlan, check_orders, plan_sweep
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.pipeline.asking import ask_alone, keep_alone, recall_alone
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.evaluating import Evaluation, evaluate
from transplant_ray.pipeline.exporting import export_winner
from transplant_ray.pipeline.judging import EXPORTED
from transplant_ray.pipeline.merging import evaluate_merges
from transplant_ray.pipeline.recording import SweepResult, record
from transplant_ray.pipeline.run import Run, begin, check_nodes, remember
from transplant_ray.pipeline.searching import planned_searches
from transplant_ray.pipeline.watch import Watch
from transplant_ray.probe.rankers import SCHEMA as RANKING_SCHEMA
from transplant_ray.probe.rankers import Ranking, ranking_rows
from transplant_ray.recipe import MAIN, Recipe, SearchSettings, load_recipe
from transplant_ray.tables import write_rows
from transplant_ray.tracking.tracker import tracked

MEASURED: tuple[Split, ...] = ("select", "test")


def demo(pair: str = zoo.PAIRS[0], overrides: Sequence[str] = (), watch: Watch | None = None) -> SweepResult:
    """Sweep a pair of the zoo by its own recipe."""
    return sweep(load_recipe(zoo.recipe_path(pair), overrides), watch)


def rank(recipe: Recipe, watch: Watch | None = None) -> list[Ranking]:
    """Rank the modules of a pair and write rankings.parquet; nothing is grafted."""
    run = begin(recipe, watch)
    with terminable(), connect(recipe.resources) as capacity, run.claimed("rank"), plain_errors(), terminable():
        run = check_nodes(run, capacity)
        return _probe(run, capacity, baselines=(), searches={}, on_answer=lambda *_: None).rankings


def sweep(recipe: Recipe, watch: Watch | None = None) -> SweepResult:
    """The main job, end to end. Raises before anything is started where the recipe cannot work; variants that fail are rows."""
    run = begin(recipe, watch)
    with (
        terminable(),
        tracked(recipe, run.stopwatch.watch.note) as tracker,
        connect(recipe.resources) as capacity,
        run.claimed("sweep"),
        plain_errors(),
        terminable(),
    ):
        run = check_nodes(run, capacity)
        run = remember(run)
        probed = _probe_and_ask_the_source(run, capacity)
        evaluation = evaluate(run, _plan(run, probed), probed.norms, capacity, tracker)
        evaluation.results += evaluate_merges(evaluation, capacity)
        confirmed = _confirm(evaluation, capacity)
        recorded = record(run, evaluation, [*evaluation.results, *confirmed], probed, tracker)
        run.journal.exit = int(bool(recorded.failed or tracker.refused))
    return replace(recorded, refused=tracker.refused)


def _probe_and_ask_the_source(run: Run, capacity: Capacity) -> ProbeResult:
    """The source is loaded to be probed, so it answers for itself there; what it has answered before it is not asked again."""
    weights = run.memory.weights[0] if run.memory else ""
    said, unknown = recall_alone(run, weights, "source", run.asked(MEASURED))
    search = run.job.recipe.search
    probed = _probe(run, capacity, unknown, {} if search is None else search.wanted, partial(keep_alone, run, weights))
    for asked, shard in [*said, *probed.source]:
        run.add(asked.task, asked.split, shard)
    return probed


def _probe(
    run: Run, capacity: Capacity, baselines: Sequence[Asked], searches: Mapping[str, SearchSettings], on_answer: OnAnswer
) -> ProbeResult:
    job = run.job
    plan = ProbePlan(
        rankers=job.recipe.rank.by,
        activations=job.activations,
        resident=job.resident_rankers,
        steps=job.recipe.rank.steps,
        trajectory=job.recipe.rank.trajectory,
        settings=job.probe_settings,
        probe=job.examples["probe"],
        rules=job.rules,
        searches=searches,
        guards={name: job.tasks[name].examples["probe"] for name in job.recipe.guards.choosing},
        texts=job.passages.get("probe", ()),
        baselines=baselines,
        seed=job.recipe.task.split.seed,
    )
    with run.stopwatch.stage("probe and rank", num_probe_steps(plan)):
        probed = run_probe(job.comparison, plan, run.workload, capacity, run.stopwatch.watch.advance, on_answer)
    for name, reason in probed.failed.items():
        run.stopwatch.watch.note(f"search {name} failed and has no trials: {reason}")
    for ranking in probed.rankings:
        for note in ranking.measured.notes if ranking.measured else ():
            run.stopwatch.watch.note(note)
    write_norms(run.folder.modules, probed.norms, job.comparison.modules)
    write_rows(run.folder.rankings, ranking_rows(probed.rankings, job.comparison.modules), RANKING_SCHEMA)
    return probed


def _plan(run: Run, probed: ProbeResult) -> SweepPlan:
    modules, rankings = run.job.comparison.modules, probed.rankings
    orders = {ranking.ranker: ranking.order for ranking in rankings}
    check_orders(orders, modules)
    channels = {r.ranker: r.measured.channels for r in rankings if r.measured and r.measured.channels}
    plan = plan_sweep(modules, orders, run.job.recipe.sweep, channels, planned_searches(run.job.recipe, probed.found))
    for note in plan.notes:
        run.stopwatch.watch.note(note)
    run.tell(VariantsPlanned(_labels(plan)))
    return plan


def _labels(plan: SweepPlan) -> dict[str, str]:
    """Variant id → how a plan calls it first, before arms do."""
    entries = [*plan.entries, *(entry for arm in plan.arms for entry in arm)]
    return {entry.id: entry.label for entry in reversed(entries)}


def _confirm(evaluation: Evaluation, capacity: Capacity) -> list[Result]:
    """Export the winner, reload it, let it answer: what a checkpoint is said to reach is measured on the checkpoint.

    Returns the rows of the test split: the baselines and the winner. None where nothing won, or test stays shut.
    """
    run, plan, winner = evaluation.run, evaluation.plan, evaluation.winner
    if winner is None:
        return []
    planned = plan.trial(winner.label)
    with run.stopwatch.stage("export"):
        export_winner(run.job.recipe, run.job.comparison, planned.variant, [winner], run.folder)
    run.tell(Exported(winner.variant, str(run.folder.checkpoint)))
    exported = open_checkpoint(str(run.folder.checkpoint), accept=run.job.recipe.accept)
    asked = [one for one in run.asked(MEASURED) if (evaluation.test_opened if one.split == "test" else one.task == MAIN)]
    with run.stopwatch.stage("confirm", sum(len(one.examples) for one in asked)):
        for one, shard in ask_alone(run, exported, EXPORTED, asked, capacity):
            run.take(one.task, one.split, shard)
    if not evaluation.test_opened:
        return []
    beside = [evaluation.row(entry, "test") for entry in evaluation.beside_the_winner()]
    return [*beside, replace(evaluation.row(planned, "test", EXPORTED), winner=True)]
