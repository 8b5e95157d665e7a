"""The verdict: what a sweep has shown, in one of a few fixed phrases and one sentence of numbers (method.md, "Verdict").

A fixed sequence, each step at 0.05: is there a gap (on select); then on test, is the winner better than the target; better than
chance; and are the guards unharmed. What comes after the first step that fails describes, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transplant_ray.evaluate.arms import Arms
from transplant_ray.evaluate.loss_tests import LossPairs, LossTest
from transplant_ray.evaluate.significance import (
    ALPHA,
    Guard,
    GuardTest,
    McNemar,
    Scores,
    arms_needed,
    chance_p,
    check_guards,
    compare,
    examples_needed,
    mean_score,
)
from transplant_ray.recipe import FEWEST_ARMS

Conclusion = Literal[
    "confirmed",
    "confirmed, with loss",
    "gain, chance not tested",
    "gain, chance not testable",
    "gain, not better than chance",
    "not distinguishable from the target",
    "worse than the target",
    "no gap to close",
]


Test = McNemar | LossTest


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a verdict is made from."""

    select_target: Scores
    select_source: Scores
    target: Scores
    """On test, as everything that follows."""
    winner: Scores
    """Of the exported checkpoint."""
    size: float
    """Modules that the winner changes, those of which some channels are by their share."""
    num_modules: int
    """Compatible modules of the winner's kind: what a random set is drawn from."""
    chosen_from: int
    """Trials that the winner was chosen from; 1 where it was named beforehand."""
    arms: Arms | None = None
    guards: tuple[Guard, ...] = ()
    missing: tuple[str, ...] = ()
    """Guards that the target or the winner could not answer."""


@dataclass(frozen=True)
class Verdict:
    conclusion: Conclusion
    sentence: str
    gap: Test
    """Target → source on select."""
    gain: Test | None = None
    """Target → winner on test; None where there was no gap to close."""
    chance: float | None = None
    """p against the arms; None where it was not tested."""
    guards: tuple[GuardTest, ...] = ()
    examples_needed: int | None = None
    """Examples of the split, or of each failed guard, at which what was observed would show with power 0.8."""
    arms_needed: int | None = None


def no_gap(select_target: Scores, select_source: Scores) -> Verdict | None:
    """The verdict where the source is not better than the target, one-sided; None where it is. To be asked before test opens."""
    return _by_gap(compare(select_target, select_source))


def _by_gap(gap: Test) -> Verdict | None:
    if gap.p_better <= ALPHA:
        return None
    needed = examples_needed(gap, level=ALPHA)
    sentence = f"the source {_compare(gap, 'select', gap.p_better, 'one-sided p')}; {_examples(needed, 'a gap')}."
    return Verdict("no gap to close", sentence, gap, examples_needed=needed)


def judge(evidence: Evidence) -> Verdict:
    """The verdict. ValueError where answers are not to the same examples, or a margin is not in (0, 1)."""
    gap = compare(evidence.select_target, evidence.select_source)
    closed = _by_gap(gap)
    if closed:
        return closed
    gain = compare(evidence.target, evidence.winner)
    guards = check_guards(evidence.guards, len(evidence.missing))
    end = _by_gain(gain) or _with_examples(_by_chance(evidence, guards), gain)
    return Verdict(
        end.conclusion,
        f"the winner {_compare(gain, 'test', gain.p, 'p')}; {end.why}.",
        gap,
        gain,
        end.chance,
        guards,
        end.examples_needed,
        end.arms_needed,
    )


@dataclass(frozen=True)
class _End:
    """The step at which the sequence ended."""

    conclusion: Conclusion
    why: str
    chance: float | None = None
    examples_needed: int | None = None
    arms_needed: int | None = None


def _by_gain(gain: Test) -> _End | None:
    """None where there is one. The two-sided p decides, for both directions have a conclusion of their own."""
    if gain.p > ALPHA:
        needed = examples_needed(gain)
        return _End("not distinguishable from the target", _examples(needed, "a gain"), examples_needed=needed)
    if gain.difference < 0:
        return _End("worse than the target", "no number of examples would make this a gain")
    return None


def _by_chance(evidence: Evidence, guards: Sequence[GuardTest]) -> _End:
    if 2 * evidence.size > evidence.num_modules:
        return _End("gain, chance not testable", _too_many(evidence))
    arms = evidence.arms
    if arms is None or len(arms.scores) < FEWEST_ARMS or arms.sets_each < evidence.chosen_from:
        return _End("gain, chance not tested", _arms_missing(arms, evidence.chosen_from), arms_needed=FEWEST_ARMS)
    score, num_arms = mean_score(evidence.winner), len(arms.scores)
    p, as_good = chance_p(score, arms.scores), sum(arm >= score for arm in arms.scores)
    against = f"{as_good} of {_name_arms(num_arms, arms.sets_each)} did as well (p = {p:.2g})"
    if p > ALPHA:
        needed = arms_needed(as_good, num_arms)
        return _End("gain, not better than chance", f"{against}; {_more_arms(needed)}", p, arms_needed=needed)
    return _by_guards(guards, evidence.missing, against, p)


def _with_examples(end: _End, gain: Test) -> _End:
    """Where nothing is left to be shown by more arms or more of a guard: how many examples the gain itself takes."""
    if end.conclusion not in ("confirmed", "gain, chance not testable"):
        return end
    needed = examples_needed(gain)
    return replace(end, why=f"{end.why}; {_examples(needed, 'a gain')}", examples_needed=needed)


def _by_guards(guards: Sequence[GuardTest], missing: Sequence[str], against: str, chance: float) -> _End:
    if missing:
        why = f"{against}; it could not be measured on {', '.join(missing)}, so no loss there is ruled out"
        return _End("confirmed, with loss", why, chance)
    if not guards:
        return _End("confirmed", f"{against}; no guard was measured", chance)
    failed = [guard for guard in guards if not guard.holds]
    if not failed:
        return _End("confirmed", f"{against}; no guard lost more than its margin ({', '.join(map(_guard, guards))})", chance)
    needed = [examples_needed(g.pairs, margin=g.margin, level=ALPHA / len(guards)) for g in failed]
    listed = ", ".join(f"{_guard(g)}: {_guard_examples(n)}" for g, n in zip(failed, needed, strict=True))
    most = None if None in needed else max(n for n in needed if n is not None)
    return _End("confirmed, with loss", f"{against}; a loss over the margin is not ruled out ({listed})", chance, most)


# Words.


def _compare(test: Test, split: str, p: float, name: str) -> str:
    if isinstance(test, LossTest):
        return (
            f"has a loss of {test.after:.3f} nats a token on {test.n} {split} examples, the target {test.before:.3f} "
            f"({name} = {p:.2g})"
        )
    return (
        f"is right on {_percent(test.after)} of {test.n} {split} examples, the target on {_percent(test.before)} "
        f"({test.gained} gained, {test.lost} lost, {name} = {p:.2g})"
    )


def _examples(needed: int | None, what: str) -> str:
    if needed is None:
        return f"nothing points to {what}, so no number of examples would show it"
    return f"about {needed:,} examples would show {what} of this size"


def _name_arms(num_arms: int, sets_each: int) -> str:
    return f"{num_arms} random sets" if sets_each == 1 else f"{num_arms} arms of {sets_each} random sets each"


def _arms_missing(arms: Arms | None, chosen_from: int) -> str:
    there = f"there are {_name_arms(len(arms.scores), arms.sets_each)}" if arms and arms.scores else "there are none"
    return f"to tell it from chance takes {_name_arms(FEWEST_ARMS, chosen_from)} or more, and {there}"


def _too_many(evidence: Evidence) -> str:
    return (
        f"{evidence.size:g} of {evidence.num_modules} modules are over half, where random sets are nearly the same set: "
        f"chance can be tested up to K = {evidence.num_modules // 2}"
    )


def _more_arms(needed: int | None) -> str:
    return f"with this share, {'no number of' if needed is None else f'about {needed:,}'} arms would tell"


def _guard(guard: GuardTest) -> str:
    name = f"{guard.name} (held out)" if guard.held_out else guard.name
    nats = isinstance(guard.pairs, LossPairs)
    shown: Callable[[float], str] = (lambda change: f"{change:+.3f}") if nats else _points
    worst = "" if guard.interval.low is None else f", at worst {shown(guard.interval.low)}"
    margin = f"{guard.margin:.3f}" if nats else f"{100 * guard.margin:.1f}"
    unit = "nats" if nats else "points"
    return f"{name} {shown(guard.pairs.difference)} {unit}{worst}, margin {margin}, p = {guard.p_holm:.2g}"


def _guard_examples(needed: int | None) -> str:
    return "no number of examples would rule it out" if needed is None else f"about {needed:,} examples would rule it out"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"
