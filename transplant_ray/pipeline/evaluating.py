"""The evaluation stage of a sweep: screen by loss, race over rungs, and give Tune's trials what came of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean

from transplant_ray.distributed.cluster import Capacity
from transplant_ray.distributed.facts import TrialReported, VariantDone, VariantsAsked, Winner
from transplant_ray.distributed.overseer import Overseer, working
from transplant_ray.distributed.pool import Divergences, Pool, evaluator_pool
from transplant_ray.distributed.trials import Trials
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.arms import Arms
from transplant_ray.evaluate.example import Split
from transplant_ray.evaluate.outcome import Tally
from transplant_ray.evaluate.race import legs, pass_rung, pass_screen
from transplant_ray.evaluate.results import Result, Stopped, choose_winner
from transplant_ray.evaluate.verdict import no_gap
from transplant_ray.graft.export import describe_variant
from transplant_ray.graft.norms import Norms, alpha_of_equal_norm, moved
from transplant_ray.graft.plan import Planned, SweepPlan
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.pipeline.arms import evaluate_arms
from transplant_ray.pipeline.asking import ask, work_off
from transplant_ray.pipeline.guarding import with_guards
from transplant_ray.pipeline.planning import count_answers
from transplant_ray.pipeline.reading import read_divergences, read_losses
from transplant_ray.pipeline.run import Run
from transplant_ray.recipe import MAIN
from transplant_ray.tracking.tracker import Tracker


def evaluate(run: Run, plan: SweepPlan, norms: Norms, capacity: Capacity, tracker: Tracker) -> Evaluation:
    """All variants on select while Tune's trials wait for theirs; the winner; then on test what it is held against.

    Test stays shut where select shows that there is no gap to close (method.md, "Verdict").
    """
    job, resources = run.job, run.job.recipe.resources
    evaluation = Evaluation(run, plan, norms)
    sets = [entry.variant for arm in plan.arms for entry in arm]
    used = frozenset(name for variant in (*plan.variants, *sets) for name in variant.coefficients)
    rows = None if resources.batch_size == "auto" else resources.batch_size
    with evaluator_pool(
        job.comparison,
        used,
        run.workload,
        capacity,
        job.examples["select"][: resources.shard_size],
        job.rules,
        rows,
        Overseer(run.tell, resources.gpus_per_model),
        run.stopwatch.watch.note,
    ) as pool:
        evaluation.rows_per_step = pool.rows
        trials = Trials(plan.trials)
        stage = _Stage(evaluation, trials, pool)
        if job.recipe.sweep.screen is not None:
            with run.stopwatch.stage("screen by loss", len(plan.variants), "variants"):
                stage.screen()
        elif job.reads_references:
            with run.stopwatch.stage("read references", len(plan.variants), "variants"):
                stage.read_references(plan.variants)
        if job.passages:
            with run.stopwatch.stage("compare on general text", stage.num_live, "variants"):
                stage.compare_on_text()
        run.tell(VariantsAsked(stage.num_live))
        answering = working(stage.answer, on_failure=trials.fail, stop=pool.fleet.overseer.stop)
        with run.stopwatch.stage("evaluate", stage.num_answers()), answering:
            trials.run(run.folder.tune, lambda result: stage.report(result, tracker))
        stage.report_lost(tracker)
        evaluation.choose()
        if evaluation.winner is not None:
            run.tell(Winner(evaluation.winner.label, evaluation.winner.variant, evaluation.winner.score))
            stage.match_winner()
            gap = _gap_on_select(run)
            if gap is False:
                run.stopwatch.watch.note("no gap to close on select: the test split stays shut")
            else:
                evaluation.test_opened = run.folder.open_tests(
                    {name: [example.id for example in task.examples["test"]] for name, task in job.tasks.items()},
                    job.recipe.identity(),
                )
                _answer_on_test(evaluation, pool)
            if plan.arms and gap:
                evaluation.arms = evaluate_arms(run, plan.arms, pool)
    return evaluation


def _gap_on_select(run: Run) -> bool | None:
    """Whether there is something to close; None where the target or the source could not answer, so that nobody knows."""
    target, source = (run.scores(MAIN, "select", name) for name in (ORIGIN.id, "source"))
    return None if target is None or source is None else no_gap(target, source) is None


def _answer_on_test(evaluation: Evaluation, pool: Pool) -> None:
    """What the winner will be held against: the baselines, on the task and the guards, and the text that nothing was chosen on."""
    run, plan = evaluation.run, evaluation.plan
    baselines = [entry.variant for entry in evaluation.beside_the_winner() if entry.role != "source"]
    tasks = run.job.tasks
    with run.stopwatch.stage("baselines on test", len(baselines) * sum(len(task.examples["test"]) for task in tasks.values())):
        for name in tasks:
            ask(run, pool, name, "test", baselines)
    assert evaluation.winner is not None
    if run.job.passages:
        variants = [*baselines, plan.trial(evaluation.winner.label).variant]
        evaluation.divergences["test"] = read_divergences(run, pool, variants, "test", lambda _: None)


@dataclass(frozen=True)
class Trial:
    """What Tune reported of one grid point, and its run in MLflow."""

    result: Result
    run: Future[str]
    """Its id, once MLflow has answered."""


@dataclass
class Evaluation:
    """What the stage found, beside the answers."""

    run: Run
    plan: SweepPlan
    norms: Norms
    rows_per_step: int = 0
    losses: dict[str, float | None] = field(default_factory=dict)
    """Variant id → mean token loss on select."""
    divergences: dict[Split, Divergences] = field(default_factory=dict)
    """KL(target ‖ variant) on each passage of general text."""
    results: list[Result] = field(default_factory=list)
    """One row per planned variant, on select, once all have answered."""
    stopped: dict[str, Stopped] = field(default_factory=dict)
    """Variant id → why it was not evaluated on all of select."""
    reported: dict[str, Trial] = field(default_factory=dict)
    """What Tune reported, by label."""
    arms: Arms | None = None
    """What chance reached; None where it was not tried."""
    matched: Planned | None = None
    """The uniform merge that moves as much of ‖ΔW‖ as the winner."""
    test_opened: Mapping[str, int] = field(default_factory=dict)
    """Task or guard → how many recipes under this storage have opened its test split, this one included; empty while it is shut."""

    def row(self, entry: Planned, split: Split = "select", name: str | None = None) -> Result:
        """The row of a planned variant, as far as it has come; `name` is who answered where that is not the variant itself."""
        who = name or entry.id
        tally = self.run.tally(MAIN, split, who) or Tally(0, 0, 0.0)
        row = with_guards(self.run, self.run.row(entry, split, tally), entry, who)
        share = None if entry.role == "source" else moved(entry.variant, self.norms)
        row = replace(row, kl=self._divergence(entry, split), moved=share)
        return (
            replace(row, loss=self.losses.get(entry.id, row.loss), stopped=self.stopped.get(entry.id)) if split == "select" else row
        )

    @property
    def winner(self) -> Result | None:
        """Its row on select."""
        return next((row for row in self.results if row.winner), None)

    def beside_the_winner(self) -> list[Planned]:
        """What answers on test besides the winner: the baselines, and the merge that moves as much."""
        return [entry for entry in self.plan.entries if entry.role in ("target", "source", "all") or entry == self.matched]

    def choose(self) -> None:
        """Take stock of select. A trial that reported nothing is a failed row, whatever the evaluator saw."""
        rows = [self._reported(entry) if entry.role == "trial" else self.row(entry) for entry in self.plan.entries]
        winner = choose_winner([row for row in rows if self.plan.primary in (None, row.label)])
        chosen = winner and winner.label
        self.results = [replace(row, winner=(row.role, row.label) == ("trial", chosen)) for row in rows]

    def _divergence(self, entry: Planned, split: Split) -> float | None:
        """Mean over the passages; none for the source, which is no variant."""
        values = self.divergences.get(split, {}).get(entry.id, ())
        known = [value for value in values if value is not None]
        return mean(known) if known and len(known) == len(values) else None

    def _reported(self, entry: Planned) -> Result:
        trial = self.reported.get(entry.label)
        if trial is not None:
            return trial.result
        row = self.row(entry)
        return replace(
            row, score=None, accuracy=None, correct=None, ci_low=None, ci_high=None, tir=None, recovery=None, worth=None,
            error=row.error or "its trial ended without reporting",
        )  # fmt: skip


class _Stage:
    """Variants on their way through select."""

    def __init__(self, evaluation: Evaluation, trials: Trials, pool: Pool) -> None:
        self.evaluation, self.trials, self.pool = evaluation, trials, pool
        self.run, self.plan = evaluation.run, evaluation.plan
        self.sweep = self.run.job.recipe.sweep
        self.examples = self.run.job.examples["select"]
        self.unposted = list(self.plan.trials)
        self.done: set[str] = set()

    @property
    def num_live(self) -> int:
        return sum(map(self._goes_on, self.plan.variants))

    def num_answers(self) -> int:
        """At most: a variant that fails answers less."""
        return count_answers(self.plan, self.run.job)

    def compare_on_text(self) -> None:
        """How far every variant is from the target where nothing is asked."""
        live = [variant for variant in self.plan.variants if self._goes_on(variant)]
        advance = self.run.stopwatch.watch.advance
        self.evaluation.divergences["select"] = read_divergences(self.run, self.pool, live, "select", advance)

    def answer(self) -> None:
        """The task, leg by leg, then the guards."""
        self.race()
        live = [variant for variant in self.plan.variants if self._goes_on(variant)]
        for name, guard in self.run.job.guards.items():
            work_off(self.run, self.pool, name, live, guard.examples["select"], partial(self._take, name))
            failed = [tally.error for tally in self.run.answered[name].tallies.get("select", {}).values() if tally.error]
            if failed:
                self.run.stopwatch.watch.note(f"guard {name}: {len(failed)} variants failed, the first with {failed[0]}")

    def screen(self) -> None:
        """Read the reference answers with every variant; of those that may be stopped, only the best go on."""
        assert self.sweep.screen is not None
        self.read_references(self.plan.variants)
        racers = {variant.id: self.evaluation.losses[variant.id] for variant in self.plan.racers}
        self._stop(racers.keys() - pass_screen(racers, self.sweep.screen), "screened")

    def read_references(self, variants: Sequence[Variant]) -> None:
        """Their mean token loss on select."""
        advance = self.run.stopwatch.watch.advance
        self.evaluation.losses |= read_losses(self.run, self.pool, variants, self.examples, advance)

    def race(self) -> None:
        """All who are left answer, leg by leg; at every rung the worse of those that may be stopped are."""
        race = self.sweep.race
        for leg in legs(len(self.examples), race):
            live = [variant for variant in self.plan.variants if self._goes_on(variant)]
            work_off(self.run, self.pool, MAIN, live, self.examples[leg], partial(self._take, MAIN))
            if race is not None and leg.stop < len(self.examples):
                tallies = self.run.answers.tallies["select"]
                racers = {v.id: tallies[v.id].score for v in self.plan.racers if self._goes_on(v)}
                self._stop(racers.keys() - pass_rung(racers, race), "raced")
                for entry in self.unposted:
                    self.trials.post(self.evaluation.row(entry), last=False)

    def match_winner(self) -> None:
        """A control that could not be planned: all modules, each as far as takes the model the distance that the winner went."""
        evaluation, job = self.evaluation, self.run.job
        winner = evaluation.winner
        if winner is None:
            return
        alpha = round(alpha_of_equal_norm(self.plan.trial(winner.label).variant, evaluation.norms), 4)
        names = [module.name for module in job.comparison.modules]
        matched = Planned("control", Variant.uniform(names, alpha), "uniform", "all", len(names), alpha)
        same = next((entry for entry in self.plan.entries if entry.id == matched.id), None)
        if same is not None:  # a merge of the grid moves as much, or the winner is such a merge itself
            evaluation.matched = same if same.role == "control" else None
            return
        if not 0 < alpha < 1:
            return
        evaluation.matched, evaluation.plan = matched, replace(self.plan, entries=(*self.plan.entries, matched))
        with self.run.stopwatch.stage("merge of equal distance", sum(len(task.examples["select"]) for task in job.tasks.values())):
            for name in job.tasks:
                ask(self.run, self.pool, name, "select", [matched.variant])
            if evaluation.losses:
                self.read_references([matched.variant])
            if job.passages:
                found = read_divergences(self.run, self.pool, [matched.variant], "select", lambda _: None)
                evaluation.divergences["select"] |= found
        evaluation.results.append(evaluation.row(matched))

    def report(self, result: Result, tracker: Tracker) -> None:
        """A trial has ended in Tune: it becomes a run in MLflow."""
        facts = (result.label, result.variant, result.n, result.score, result.stopped, result.error)
        self.run.tell(TrialReported(*facts))
        description = describe_variant(self.run.job.comparison, self.plan.trial(result.label).variant)
        self.evaluation.reported[result.label] = Trial(result, tracker.log_trial(result, description))

    def report_lost(self, tracker: Tracker) -> None:
        """A trial whose process died once too often ended in Tune without a word; what it waited for is here all the same."""
        reported = self.evaluation.reported
        lost = [entry for entry in self.plan.trials if entry not in self.unposted and entry.label not in reported]
        for entry in lost:
            self.report(self.evaluation.row(entry), tracker)
        if lost:
            died = f"trials that Ray Tune gave up, for their processes died: {len(lost)}; their results are known"
            self.run.stopwatch.watch.note(died)

    def _goes_on(self, variant: Variant) -> bool:
        tally = self.run.answers.tallies["select"].get(variant.id)
        return variant.id not in self.evaluation.stopped and (tally is None or tally.error is None)

    def _take(self, task: str, shard: VariantShard) -> None:
        self.run.take(task, "select", shard)
        variant = shard.variant
        if variant in self.done or not self.run.is_complete(variant):
            return
        self._has_done(variant)
        if ORIGIN.id in self.done:  # without the target's answers there is nothing to hold a row against
            ready = self.done if variant == ORIGIN.id else {variant}
            self._post(lambda entry: entry.id in ready)

    def _stop(self, variants: Collection[str], why: Stopped) -> None:
        self.evaluation.stopped |= dict.fromkeys(sorted(variants), why)
        for variant in sorted(variants):
            self._has_done(variant, why)
        self._post(lambda entry: entry.id in variants)

    def _has_done(self, variant: str, stopped: Stopped | None = None) -> None:
        if variant not in self.done:
            self.done.add(variant)
            self.run.tell(VariantDone(variant, stopped))

    def _post(self, ready: Callable[[Planned], bool]) -> None:
        """Give these trials their last row."""
        going = [entry for entry in self.unposted if ready(entry)]
        self.unposted = [entry for entry in self.unposted if not ready(entry)]
        for entry in going:
            self.trials.post(self.evaluation.row(entry), last=True)
