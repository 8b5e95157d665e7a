"""Numbers and phrases as the report writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.report.records import Measure, Row
from transplant_ray.report.sweep import Sweep, dig

NOTHING = "–"
"""For a number that is undefined or was not measured."""

MEANINGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "confirmed": (
            "good",
            "The gain is there on examples that nothing was chosen on, and chance with as much choice did worse.",
        ),
        "confirmed, with loss": ("caution", "The gain is real and larger than chance's, but a loss elsewhere is not ruled out."),
        "gain, chance not tested": (
            "caution",
            "The gain is real. Whether the ranking is the reason, or any set of this size would do, was not tested.",
        ),
        "gain, chance not testable": (
            "caution",
            "The gain is real. The winner holds so many modules that random sets are nearly the same set, so the ranking is not "
            "shown to be the reason.",
        ),
        "gain, not better than chance": (
            "caution",
            "The gain is real, and random sets that were chosen in the same way do as well.",
        ),
        "not distinguishable from the target": ("flat", "What was measured fits a transplant that does nothing."),
        "worse than the target": ("bad", "The transplant lost more examples than it gained."),
        "no gap to close": ("flat", "The source is not better than the target at this task, so there was nothing to bring back."),
    }
)
"""Conclusion → how good the news is, and what it says to somebody who does not know the tests."""


def number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else NOTHING


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else NOTHING


def change(value: Any, measure: Measure) -> str:
    """A difference of scores."""
    return f"{measure.factor * value:+.{measure.digits}f}" if isinstance(value, int | float) else NOTHING


def between(low: Any, high: Any, shown: Callable[[Any], str] = number) -> str:
    """An interval; empty where an end is missing."""
    return "" if low is None or high is None else f"[{shown(low)} – {shown(high)}]"


def interval(row: Row) -> str:
    return between(row.ci_low, row.ci_high)


def count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def text(value: Any) -> str:
    """Anything from a recipe or a summary on one line."""
    if value is None or value == [] or value == {}:
        return NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items())
    return ", ".join(map(text, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Column:
    """One column of the table of variants."""

    title: str
    value: Callable[[Row], Any]
    shown: Callable[[Any], str]
    about: str


def _share(part: Callable[[Row], int | None]) -> Callable[[Row], float | None]:
    def share(row: Row) -> float | None:
        counted = part(row)
        return None if counted is None or not row.n else counted / row.n

    return share


def _loss_beside(row: Row) -> float | None:
    """Where it is the score, it has a column already."""
    return None if row.accuracy is None and row.score is not None else row.loss


def _perplexity(row: Row) -> float | None:
    return None if row.loss is None else perplexity(row.loss)


GUARDS_KEPT = "mean over the guards of accuracy ÷ the target's; of a loss, the target's perplexity ÷ its own"

COLUMNS: tuple[Column, ...] = (
    Column("n", lambda row: row.n, str, "examples"),
    Column("TIR", lambda row: row.tir, lambda value: number(value, 2), "accuracy ÷ the target's"),
    Column("Recovery", lambda row: row.recovery, percent, "share of the gap between source and target that is closed"),
    Column("modules", lambda row: row.num_modules, count, "changed modules"),
    Column("parameters", lambda row: row.num_parameters, count, "changed parameters"),
    Column("‖ΔW‖ moved", lambda row: row.moved, percent, "share of the difference between the weights"),
    Column("channels", lambda row: row.channels, percent, "share of the output channels of each module"),
    Column("λ", lambda row: row.penalty, lambda value: "–" if value is None else f"{value:g}", "weight of the guard loss"),
    Column(
        "guards",
        lambda row: row.guard_share,
        percent,
        "mean over the guards of accuracy ÷ the target's; of a loss, the target's perplexity ÷ its own",
    ),
    Column("KL", lambda row: row.kl, number, "KL(target ‖ variant) on general text, nats per token"),
    Column("loss", _loss_beside, number, "mean token loss of the reference answers, nats"),
    Column("perplexity", _perplexity, number, "exp of the mean loss, every example counted once"),
    Column("parsed", _share(lambda row: row.parsed), percent, "completions in which an answer was found"),
    Column("cut off", _share(lambda row: row.cut_off), percent, "completions that the limit of tokens ended"),
    Column("seconds", lambda row: row.seconds, lambda value: number(value, 1), "of the evaluator"),
)


def measured_columns(rows: Sequence[Row]) -> list[Column]:
    """Those with a number in some row."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def cautions(sweep: Sweep) -> list[str]:
    """What a reader should know before believing the first line."""
    return [caution for check in CHECKS for caution in check(sweep)]


def _of_the_winner(sweep: Sweep) -> list[str]:
    winner = sweep.winner
    if winner is None:
        return []
    found = []
    if winner.split != "test":
        found.append("The winner's numbers are from select, on which it was chosen: they flatter it. It was not confirmed on test.")
    same, control = sweep.twins, sweep.told("winner", "best_control")
    if same:
        found.append(f"The ranking made no difference here: the winner's modules are also those of {', '.join(same)}.")
    label, (reached, mine) = dig(control, "label"), (_told_score(told) for told in (control, sweep.told("winner", "select")))
    if label not in same and mine is not None and reached is not None and reached >= mine:
        found.append(f"A control did at least as well on select: {label}, {number(abs(reached))} against {number(abs(mine))}.")
    return found


def _told_score(told: Any) -> float | None:
    """Runs of before there were losses have accuracies alone."""
    score = dig(told, "score")
    found: float | None = dig(told, "accuracy") if score is None else score
    return found


def _of_the_test(sweep: Sweep) -> list[str]:
    opened = sweep.told("test_opened")
    if not isinstance(opened, int) or opened <= 1:
        return []
    return [f"This test split was opened {opened} times so far: what is chosen by looking at it is no longer confirmed by it."]


def _of_the_guards(sweep: Sweep) -> list[str]:
    known = sweep.guards or any(row.guard_share is not None or row.kl is not None for row in sweep.rows)
    return [] if known else ["No guard was measured: what the gain costs elsewhere is not known."]


def _of_the_export(sweep: Sweep) -> list[str]:
    n, equal = (sweep.told("winner", "exported_agrees", key) for key in ("n", "equal"))
    if not n or n == equal:
        return []
    return [f"The exported checkpoint, reloaded, answered {n - equal} of {n} select examples with other words than in the sweep."]


def _of_failures(sweep: Sweep) -> list[str]:
    failed = [row for row in sweep.rows if row.error]
    searches = sweep.told("failed_searches")
    told = [f"Search {name} failed: {_first_line(why)}" for name, why in (searches if isinstance(searches, dict) else {}).items()]
    if failed:
        why = f"their reasons are in the table of variants. The first: {_first_line(failed[0].error)}"
        told.append(f"{len(failed)} of {len(sweep.rows)} rows failed; {why}")
    return told


def _first_line(reason: Any) -> str:
    return (str(reason).splitlines() or [""])[0][:200]


def _of_the_unjudged(sweep: Sweep) -> list[str]:
    counts = {split: sweep.told("unjudged", split) for split in ("select", "test")}
    told = [f"{count} on {split}" for split, count in counts.items() if isinstance(count, int) and count]
    if not told:
        return []
    return [f"Answers that no scorer could judge count as wrong: {' and '.join(told)}. The outcomes say which, and why."]


def _of_warnings(sweep: Sweep) -> list[str]:
    return sweep.listed("warnings")


CHECKS = (_of_the_winner, _of_the_test, _of_the_guards, _of_the_export, _of_the_unjudged, _of_failures, _of_warnings)
