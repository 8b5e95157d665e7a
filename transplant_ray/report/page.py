"""The page: what each section shows, as plain values for the template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from transplant_ray.report import words
from transplant_ray.report.figures import changed_plot, cost_plots, curve_plots, headline_plot, legend, score_plots
from transplant_ray.report.flips import MOST_SHOWN, shown, visible
from transplant_ray.report.method import agreements, method, ranker_costs
from transplant_ray.report.records import ACCURACY, GuardRow, Row, measure_of
from transplant_ray.report.sweep import Sweep, dig

HERE = Path(__file__).parent
GROUPS = {"target": "baselines", "source": "baselines", "all": "baselines", "trial": "trials", "control": "controls"}


@dataclass(frozen=True)
class Headline:
    """What the first screen says."""

    tone: str
    """good, caution, bad or flat: the colour and the sign."""
    phrase: str
    sentence: str
    meaning: str


@dataclass(frozen=True)
class Card:
    """One number of the first screen."""

    title: str
    value: str
    interval: str = ""
    note: str = ""
    measured: bool = True


@dataclass(frozen=True)
class Line:
    """A row of the table of variants; shares of the width of its interval bar in percent."""

    row: Row
    value: str
    interval: str
    bar: tuple[float, float, float] | None
    cells: Sequence[str]


def page_environment() -> Environment:
    """How templates of pages are filled in: everything that comes from a run is escaped, and nothing in it hides."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {"shown": shown, "number": words.number, "percent": words.percent, "count": words.count}
    return environment


def stylesheet() -> Markup:
    return Markup((HERE / "report.css").read_text(encoding="utf-8"))


def render(sweep: Sweep) -> str:
    """The whole page as HTML."""
    return page_environment().get_template("report.html.jinja").render(css=stylesheet(), **_context(sweep))


def _visible(value: Any) -> Any:
    """Whatever the template writes that comes from a run."""
    return visible(value) if type(value) is str else value


def _context(sweep: Sweep) -> Mapping[str, Any]:
    columns = words.measured_columns(sweep.rows)
    return {
        "sweep": sweep,
        "measure": measure_of(sweep.rows),
        "winner": sweep.winner,
        "source": dig(sweep.recipe, "source", "model"),
        "target": dig(sweep.recipe, "target", "model"),
        "headline": headline(sweep),
        "cards": list(_cards(sweep)),
        "cautions": words.cautions(sweep),
        "guards": guard_lines(sweep),
        "curve_legend": legend(sweep.rows, lines=True, merges=any(row.moved is not None for row in sweep.rows)),
        "cost_legend": legend(sweep.rows, lines=False, merges=True),
        "plots": {
            "headline": headline_plot(sweep),
            "curves": curve_plots(sweep),
            "scores": score_plots(sweep),
            "costs": cost_plots(sweep),
            "changed": changed_plot(sweep),
        },
        "changed": _changed(sweep),
        "ranker_costs": ranker_costs(sweep),
        "agreements": agreements(sweep),
        "columns": columns,
        "groups": _groups(sweep, columns),
        "flips": sweep.flips,
        "most_shown": MOST_SHOWN,
        "method": method(sweep),
    }


def headline(sweep: Sweep) -> Headline:
    """The verdict; where there is none, why."""
    phrase, sentence = sweep.told("verdict", "conclusion"), sweep.told("verdict", "sentence")
    if isinstance(phrase, str):
        tone, meaning = words.MEANINGS.get(phrase, ("flat", ""))
        return Headline(tone, _capital(phrase), _capital(str(sentence or "")), meaning)
    if sweep.winner is not None:
        return Headline(
            "flat", "No verdict", "This run does not say what it has shown; the numbers below are what it measured.", ""
        )
    trials = [row for row in sweep.on("select") if row.role == "trial"]
    failed = sum(row.error is not None for row in trials)
    why = f"{failed} of {len(trials)} trials failed" if failed else "no trial answered all examples"
    return Headline(
        "bad", "No winner", f"There is nothing to choose from: {why}.", "What was measured, and why the rest was not, is below."
    )


def guard_lines(sweep: Sweep) -> list[tuple[GuardRow, Mapping[str, GuardRow], Any]]:
    """For every guard: the winner's row, on test where it is there; those of the baselines on the same split; its test."""
    won = {row.variant for row in sweep.rows if row.winner} | {"exported"}
    tests = sweep.told("verdict", "guards")
    by_name = {dig(test, "name"): test for test in tests} if isinstance(tests, list) else {}
    found: list[tuple[GuardRow, Mapping[str, GuardRow], Any]] = []
    for name in dict.fromkeys(row.guard for row in sweep.guards):
        rows = [row for row in sweep.guards if row.guard == name]
        mine = [row for row in rows if row.variant in won and row.role not in ("control", "all")]
        if mine:
            best = max(mine, key=lambda row: row.split == "test")
            baselines = {row.role: row for row in rows if row.split == best.split and row.role in ("target", "source", "all")}
            found.append((best, baselines, by_name.get(name)))
    return found


def _cards(sweep: Sweep) -> Iterator[Card]:
    winner = sweep.winner
    if winner is None:
        return
    target, source = (sweep.baseline(role, winner.split) for role in ("target", "source"))
    told = sweep.told("winner", winner.split) or {}
    yield Card(f"Winner, {winner.split}", words.number(winner.value), words.interval(winner), f"{winner.label}, n = {winner.n}")
    if target is not None:
        yield Card("Target", words.number(target.value), words.interval(target), _beside("source", source))
        yield _gain_card(sweep, winner, target)
    reachable = dig(told, "reachable_recovery")
    of_all = "" if reachable is None else f"{words.percent(reachable)} of what swapping everything reaches"
    yield Card("Recovery", words.percent(winner.recovery), _told_interval(told, "recovery", words.percent), of_all)
    yield _moved_card(sweep, winner)
    yield _elsewhere_card(sweep, winner)


def _gain_card(sweep: Sweep, winner: Row, target: Row) -> Card:
    told = sweep.told("winner", winner.split) or {}
    gained, lost = (sweep.told("verdict", "gain", key) for key in ("gained", "lost"))
    flips = "" if gained is None or winner.split != "test" else f"{gained} gained, {lost} lost; "
    measure = measure_of(sweep.rows)
    change = partial(words.change, measure=measure)
    tir = f"TIR {words.number(winner.tir, 2)} {_told_interval(told, 'tir', lambda value: words.number(value, 2))}".strip()
    difference = None if winner.score is None or target.score is None else winner.score - target.score
    note = flips + tir if measure is ACCURACY else ""
    return Card(f"Gain, {measure.unit}", change(difference), _told_interval(told, "difference", change), note)


def _moved_card(sweep: Sweep, winner: Row) -> Card:
    every = sweep.baseline("all", "select")
    of_all = f" of {every.num_modules}" if every else ""
    notes = [f"{words.count(winner.num_parameters)} parameters"] if winner.num_parameters is not None else []
    if winner.moved is not None:
        notes.append(f"{words.percent(winner.moved)} of ‖ΔW‖")
    return Card("Modules changed", f"{winner.num_modules}{of_all}", "", ", ".join(notes))


def _elsewhere_card(sweep: Sweep, winner: Row) -> Card:
    """What it costs elsewhere, at its worst."""
    guards = [line[0] for line in guard_lines(sweep) if line[0].share is not None]
    on_select = next((row for row in sweep.on("select") if row.winner), winner)
    divergence = on_select.kl if winner.kl is None else winner.kl
    kl = "" if divergence is None else f"KL to the target {divergence:.3f} nats per token"
    if guards:
        worst = min(guards, key=lambda row: row.share or 0)
        mean = sum(row.share or 0 for row in guards) / len(guards)
        note = f"of the target's, mean of {len(guards)}; worst {worst.guard} {words.percent(worst.share)}"
        return Card("Guards kept", words.percent(mean), "", f"{note}{f'; {kl}' if kl else ''}")
    if on_select.guard_share is not None:
        return Card("Guards kept", words.percent(on_select.guard_share), "", f"of the target's, on select{f'; {kl}' if kl else ''}")
    if divergence is not None:
        return Card("KL to the target", words.number(divergence), "", "nats per token on general text; no guard was measured")
    return Card("Elsewhere", "not measured", "", "no guard, so what it costs is not known", measured=False)


def _beside(name: str, row: Row | None) -> str:
    return "" if row is None else f"{name} {words.number(row.value)} {words.interval(row)}"


def _told_interval(told: Any, metric: str, number: Any) -> str:
    return words.between(dig(told, "intervals", metric, "low"), dig(told, "intervals", metric, "high"), number)


def _changed(sweep: Sweep) -> list[tuple[str, str]]:
    """Module → what its coefficient is, in the order of the model."""

    def told(coefficient: Any) -> str:
        if not isinstance(coefficient, list):
            return f"{coefficient:g}" if isinstance(coefficient, int | float) else str(coefficient)
        return f"{sum(c != 0 for c in coefficient)} of {len(coefficient)} channels"

    layers = {score.module: score.layer for scores in sweep.scores.values() for score in scores}
    names = sorted(sweep.coefficients, key=lambda name: (layers.get(name, -1), name))
    return [(name, told(sweep.coefficients[name])) for name in names]


def _groups(sweep: Sweep, columns: Sequence[words.Column]) -> list[tuple[str, list[Line]]]:
    """The table of variants: those on test first, then select by role; every row once, the best of a group first."""
    groups: dict[str, list[Row]] = {}
    for split in ("test", "select"):
        for name in ("baselines", "trials", "controls"):
            title = "on test" if split == "test" else f"{name} on select"
            groups.setdefault(title, []).extend(row for row in sweep.rows if row.split == split and GROUPS[row.role] == name)
    rest = [row for row in sweep.rows if row.split not in ("test", "select")]
    return [
        (title, [_line(row, columns) for row in _best_first(title, rows)])
        for title, rows in [*groups.items(), ("other", rest)]
        if rows
    ]


def _best_first(title: str, rows: Sequence[Row]) -> Sequence[Row]:
    if title in ("on test", "baselines on select"):
        return rows
    return sorted(rows, key=lambda row: (not row.measured, -(row.score or 0), row.size, row.label))


def _line(row: Row, columns: Sequence[words.Column]) -> Line:
    bar = None
    if row.accuracy is not None and row.ci_low is not None and row.ci_high is not None:
        bar = (100 * row.ci_low, 100 * (row.ci_high - row.ci_low), 100 * row.accuracy)
    value = "failed" if row.error and row.value is None else words.number(row.value)
    return Line(row, value, words.interval(row), bar, [column.shown(column.value(row)) for column in columns])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
