"""What people see in a terminal: progress, tables, errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Thread
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from transplant_ray.distributed.facts import Fact
from transplant_ray.evaluate.results import Result
from transplant_ray.pipeline.pace import Pace, shown_seconds
from transplant_ray.pipeline.planning import Calibration, Memory, PlanReport
from transplant_ray.probe.rankers import Ranking

BASELINE_ROLES = ("target", "source", "all")
SHOWN_EXCLUSIONS = 5
SHOWN_STAGES = 4
BEAT_SECONDS = 30
"""So often a line tells of a stage, where there is no bar."""


class _Bars(Progress):
    """A bar per stage, and under them what there is to say of the one that is going on."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.facts:
            yield Text(f"  {self.facts}", style="dim", no_wrap=True, overflow="ellipsis")


class TerminalWatch:
    """A bar per stage on a terminal; where the output is a file or a job's log, a line per stage, and one more now and then."""

    def __init__(self, console: Console, beat: float = BEAT_SECONDS) -> None:
        self.console = console
        self.live = console.is_terminal
        columns = (
            SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TimeElapsedColumn(),
        )  # fmt: skip
        self.progress = _Bars(*columns, console=console, disable=not self.live)
        self.task: TaskID | None = None
        self.pace = Pace()
        self.beat, self.spoken = beat, time.monotonic()
        self.teller, self.ended = Thread(target=self._live_on, name="progress", daemon=True), Event()

    def __enter__(self) -> TerminalWatch:
        self.progress.start()
        self.teller.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.teller.join()
        self.progress.facts = ""
        if not any(exc):  # a bar that was left is not full
            self._end_stage()
        self.progress.stop()

    def stage(self, name: str, total: int, unit: str = "examples") -> None:
        self._end_stage()
        self.pace.begin(name, total, unit)
        if not self.live:
            self._say(f"{name} ({total:,} {unit})" if total else name)
        self.task = self.progress.add_task(name, total=total or None)

    def advance(self, amount: int) -> None:
        self.pace.advance(amount)
        if self.task is not None:
            self.progress.advance(self.task, amount)

    def note(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)

    def hear(self, fact: Fact) -> None:
        self.pace.hear(fact)

    def _live_on(self) -> None:
        """In a thread: a stage may be silent for long, and whoever follows it should see that it lives."""
        while not self.ended.wait(1 if self.live else min(1, self.beat)):
            if self.live:
                self.progress.facts = self.pace.facts()
            elif self.task is not None and time.monotonic() - self.spoken >= self.beat:
                self._say(self.pace.line())

    def _say(self, text: str) -> None:
        self.spoken = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end_stage(self) -> None:
        if self.task is not None:
            done = self.progress.tasks[-1].total or 1
            self.progress.update(self.task, total=done, completed=done)


def results_table(results: Sequence[Result], split: str = "select", top: int | None = 8) -> Table:
    """Baselines, then trials, then controls, each best first; `top` of the latter two, None for all."""
    rows = [row for row in results if row.split == split]
    trials, controls = (_best_first([row for row in rows if row.role == role]) for role in ("trial", "control"))
    groups = [
        [row for role in BASELINE_ROLES for row in rows if row.role == role],
        _top(trials, top),
        _top(controls, top),
    ]
    n = max((row.n for row in rows), default=0)
    table = Table(
        title=f"{split}, n = {n}; controls are dim",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    hidden = len(rows) - sum(map(len, groups))
    if hidden:
        table.caption = f"{hidden} more rows: transplant-ray show RUN --all"
    table.add_column("what", min_width=27, max_width=27)  # with the ids of variants in 80 columns
    losses = any(row.score is not None and row.accuracy is None for row in rows)
    for name, width in (("loss" if losses else "accuracy", 8), ("95 % CI", 11), ("TIR", 5), ("Recovery", 8)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("variant", no_wrap=True, min_width=10)
    for group in groups:
        for row in group:
            table.add_row(*_cells(row), style=_style(row))
        table.add_section()
    return table


def _best_first(rows: Sequence[Result]) -> list[Result]:
    """Those that were stopped come after those that were not, for they have seen fewer examples."""
    return sorted(
        rows,
        key=lambda row: (row.stopped is not None, row.score is None, -(row.score or 0), row.loss or 0, row.k or 0, row.label),
    )


def _top(rows: Sequence[Result], top: int | None) -> list[Result]:
    """The first `top` rows, and the winner and failures wherever they are."""
    return [row for place, row in enumerate(rows) if top is None or place < top or row.winner or row.error]


def ranking_table(ranking: Ranking, top: int = 10) -> Table:
    table = Table(title=f"ranking by {ranking.ranker}", title_justify="left")
    for name in ("rank", "module", "score"):
        table.add_column(name)
    for position, (module, score) in enumerate(list(ranking.scores.items())[:top], start=1):
        table.add_row(str(position), module, f"{score:.4g}")
    if len(ranking.scores) > top:
        table.caption = f"{len(ranking.scores) - top} more in rankings.parquet"
    return table


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The headline in sentences."""
    winner = summary["winner"]
    verdict = [f"{summary['verdict']['conclusion']}: {summary['verdict']['sentence']}"] if summary.get("verdict") else []
    if winner is None:
        return [_no_winner(summary), *verdict]
    agrees = winner["exported_agrees"]
    chosen = "named beforehand" if verdict and summary["verdict"]["primary"] else "chosen on select"
    lines = [
        *verdict,
        f"winner: {winner['label']} (variant {winner['variant']}, {winner['num_modules']} modules), {chosen}",
        *(_test_lines(summary) if "test" in winner else ["the test split was not opened"]),
        f"exported = resident: the same completion on {agrees['equal']} of {agrees['n']} select examples",
    ]
    lines += _price_lines(summary)
    if winner["same_as"]:
        lines.append(f"the ranking made no difference here: {', '.join(winner['same_as'])} hold the same modules")
    if (matched := winner.get("matched")) and matched["test"] is not None:
        told = _interval(matched["test"]) + ("" if matched["p"] is None else f" (p = {matched['p']:.2g})")
        lines.append(f"a merge of all modules that moves as much, {matched['label']}, on test: {told}")
    if winner["best_control"] is not None:
        lines.append(f"best control on select: {winner['best_control']['label']}, {_interval(winner['best_control'])}")
    return lines


def _test_lines(summary: dict[str, Any]) -> list[str]:
    """What the exported checkpoint reached on test, beside the target and the source."""
    test, baselines = summary["winner"]["test"], summary["baselines"]["test"]
    return [
        f"on test, the exported checkpoint reloaded: {_interval(test)}; "
        f"the target {_interval(baselines['target'])}, the source {_interval(baselines['source'])}",
        f"{_tir(test)}Recovery {_percent(test['recovery'])}{_between(test, 'recovery', _percent)}, "
        f"of what swapping everything reaches {_percent(test['reachable_recovery'])}",
    ]


def time_line(summary: dict[str, Any]) -> list[str]:
    """Where the time went: the longest stages, and the rest."""
    seconds = sorted(summary.get("seconds", {}).items(), key=lambda item: -item[1])
    if not seconds:
        return []
    named, rest = seconds[:SHOWN_STAGES], sum(value for _, value in seconds[SHOWN_STAGES:])
    parts = [f"{stage} {shown_seconds(value)}" for stage, value in named] + ([f"the rest {shown_seconds(rest)}"] if rest else [])
    return [f"time: {shown_seconds(sum(value for _, value in seconds))}, of which {', '.join(parts)}"]


def _no_winner(summary: dict[str, Any]) -> str:
    if summary.get("vetoed"):
        return "no winner: every trial that could be chosen loses more than the margin on a guard (`sweep.objective.veto`)"
    return "no winner: no trial answered all that it would be chosen by; the reasons are in the table"


def _price_lines(summary: dict[str, Any]) -> list[str]:
    """What the winner costs elsewhere, on test where that was opened, and how often it was looked at."""
    split = "test" if "test" in summary["winner"] else "select"
    moved, swapped = (numbers.get("kl") for numbers in (summary["winner"][split], summary["baselines"][split]["all"]))
    known = moved is not None and swapped is not None
    prices = [f"KL on general text {moved:.3g} nats a token (all swapped {swapped:.3g})"] if known else []
    for guard in summary.get("guards", ()):
        if guard["winner"] and guard["split"] == split and guard["share"] is not None:
            held_out = " (held out)" if guard["held_out"] else ""
            kept = f"{_percent(guard['share'])} of the target's accuracy"
            risen = f"perplexity {1 / guard['share']:.3g} × the target's" if guard["share"] else ""
            prices.append(f"{guard['guard']}{held_out} {risen if guard['accuracy'] is None else kept}")
    lines = [f"price: {', '.join(prices)}"] if prices else []
    if recalled := summary.get("recalled"):
        lines.append(f"{recalled:,} outcomes were known and taken from the ledger of this storage")
    opened = summary.get("test_opened", 0)
    return [*lines, f"these test examples were opened {opened} times under this storage"] if opened > 1 else lines


def print_plan(console: Console, report: PlanReport) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.modules_per_kind.items())
    console.print(f"[bold]{report.family}[/], {report.num_layers} layers; compatible modules: {kinds}", highlight=False)
    if report.excluded:
        console.print(f"left out: {len(report.excluded)} modules")
        for exclusion in report.excluded[:SHOWN_EXCLUSIONS]:
            console.print(f"  {exclusion.name}: {exclusion.reason}", markup=False)
        if len(report.excluded) > SHOWN_EXCLUSIONS:
            console.print(f"  … and {len(report.excluded) - SHOWN_EXCLUSIONS} more")
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    roles = ", ".join(f"{count} {role}" for role, count in report.variants.items())
    console.print(f"variants: {roles}; at most {report.num_distinct} to evaluate, equal ones once", highlight=False)
    examples = ", ".join(f"{n} {split}" for split, n in report.examples.items())
    console.print(f"examples: {examples}; at most {report.num_answers} answers on select", highlight=False)
    if report.num_references:
        console.print(f"reference answers read for losses: {report.num_references}", highlight=False)
    if report.guards:
        console.print(f"guards: {'; '.join(report.guards)}", highlight=False)
    if report.arms.num_arms:
        each = "one random set" if report.arms.sets_each == 1 else f"{report.arms.sets_each} random sets"
        console.print(
            f"arms: {report.arms.num_arms} of {each} each; at most {report.arms.num_answers} answers more", highlight=False
        )
    if report.merges:
        cost = f"each a checkpoint to make and load, and {report.examples['select']} answers more"
        console.print(f"merges: {', '.join(report.merges)}; {cost}", highlight=False)
    for actor, memory in report.memory.items():
        console.print(f"memory per {actor}: {_memory(memory)}", highlight=False)
    for line in report.placement:
        console.print(line, highlight=False)


def print_calibration(console: Console, calibration: Calibration, *, gpu: bool) -> None:
    unit = "GPU-hours" if gpu else "hours of one evaluator on CPU"
    console.print(
        f"measured on {calibration.device}: {calibration.seconds_per_example * 1000:.3g} ms an example, "
        f"{calibration.rows} rows at a time; {calibration.num_answers} answers take at most {calibration.hours:.3g} {unit}",
        highlight=False,
    )


def _cells(row: Result) -> tuple[str, ...]:
    if row.stopped == "screened" and row.error is None:
        return row.label, "screened", "–" if row.loss is None else f"loss {row.loss:.3f}", "–", "–", row.variant
    if row.value is None:
        reason = (row.error or "no examples").splitlines()[0]
        return f"{row.label}: {reason[:60]}", "failed", "–", "–", "–", row.variant
    guard = f": {row.error.splitlines()[0][:60]}" if row.error else ""
    mark = " *" if row.winner else f" (raced, n={row.n})" if row.stopped else guard
    interval = "–" if row.ci_low is None else f"{row.ci_low:.3f}–{row.ci_high:.3f}"
    return (
        row.label + mark, f"{row.value:.3f}", interval, _number(row.tir), _percent(row.recovery),
        row.variant,
    )  # fmt: skip


def _style(row: Result) -> str:
    if row.error is not None:
        return "red"
    if row.winner:
        return "bold green"
    return "dim" if row.role == "control" else "bold" if row.role in BASELINE_ROLES else ""


def _interval(numbers: dict[str, Any]) -> str:
    if numbers.get("score", numbers["accuracy"]) is None:
        return "–"
    loss = numbers["accuracy"] is None
    value = f"loss {numbers['loss']:.3f} nats a token" if loss else f"{numbers['accuracy']:.3f}"
    return value if numbers["ci_low"] is None else f"{value} [{numbers['ci_low']:.3f}–{numbers['ci_high']:.3f}]"


def _tir(numbers: dict[str, Any]) -> str:
    """Of losses there is none."""
    return "" if numbers["accuracy"] is None else f"TIR {_number(numbers['tir'])}{_between(numbers, 'tir', _number)}, "


def _between(numbers: dict[str, Any], metric: str, shown: Callable[[float | None], str]) -> str:
    """The interval of a ratio, where there is one."""
    interval = numbers.get("intervals", {}).get(metric, {})
    return "" if interval.get("low") is None else f" [{shown(interval['low'])}–{shown(interval['high'])}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def _memory(memory: Memory) -> str:
    return f"{_gib(memory.total)} ({_gib(memory.weights)} weights, up to {_gib(memory.cache)} key-value cache)"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"
