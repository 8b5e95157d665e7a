"""How the numbers of a report came about: models, task, splits and seeds, grid, tests, versions, places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transplant_ray.evaluate.significance import ALPHA, RESAMPLES
from transplant_ray.report.records import ACCURACY, measure_of
from transplant_ray.report.sweep import Sweep, dig
from transplant_ray.report.words import NOTHING, count, number, percent, text

Item = tuple[str, str]
"""A term and what is to be said of it."""
NOT_RECORDED = "not recorded"
WINNER_RULE = "the smallest K within one standard error of the best trial on select, then the fewest parameters"


@dataclass(frozen=True)
class RankerCost:
    """What one ranking cost, and how far it can be relied on; texts."""

    ranker: str
    passes: str
    seconds: str
    stability: str
    with_depth: str


def method(sweep: Sweep) -> dict[str, list[Item]]:
    """Heading → items. What an older run did not record says so."""
    return {"Models and task": _task(sweep), "Splits and tests": _tests(sweep), "Grid": _grid(sweep), "Run": _run(sweep)}


def ranker_costs(sweep: Sweep) -> list[RankerCost]:
    by_ranker = sweep.told("rankings", "by_ranker")
    return [_ranker_cost(name, told) for name, told in by_ranker.items()] if isinstance(by_ranker, dict) else []


def agreements(sweep: Sweep) -> list[str]:
    """Pairs of rankings, their rank correlation, and how much of their top K they share."""
    pairs = sweep.told("rankings", "agreement")
    if not isinstance(pairs, list):
        return []
    return [
        f"{dig(pair, 'first')} and {dig(pair, 'second')} {number(dig(pair, 'spearman'), 2)}{_overlap(dig(pair, 'overlap'))}"
        for pair in pairs
    ]


def _overlap(shares: Any) -> str:
    """What the first K of both have in common; nothing where it was not recorded."""
    if not isinstance(shares, dict) or not shares:
        return ""
    return f" (of the first K in both: {', '.join(f'{percent(share)} at {k}' for k, share in shares.items())})"


def _ranker_cost(name: str, told: Any) -> RankerCost:
    cost, steady = dig(told, "cost"), dig(told, "stability")
    kinds = {"forward": "forwards", "backward": "backwards", "decoding": "decodings"}
    passes = [f"{dig(cost, key)} {kind}" for kind, key in kinds.items() if dig(cost, key)]
    stability = NOTHING if steady is None else f"{number(dig(steady, 'spearman'), 2)} (n = {count(dig(steady, 'num_examples'))})"
    return RankerCost(
        name,
        ", ".join(passes) or ("none" if cost else NOTHING),
        number(dig(cost, "seconds"), 1),
        stability,
        number(dig(told, "spearman_with_depth"), 2),
    )


def _task(sweep: Sweep) -> list[Item]:
    recipe = sweep.recipe
    return [
        ("source", _model(dig(recipe, "source"))),
        ("target", _model(dig(recipe, "target"))),
        *((key, text(dig(recipe, "task", key))) for key in ("data", "prompt", "answer", "scorer", "max_new_tokens")),
        ("chat template", "yes" if dig(recipe, "task", "chat_template") else "no"),
        *([("system message", text(dig(recipe, "task", "system")))] if dig(recipe, "task", "system") else []),
        *([("stop", text(dig(recipe, "task", "stop")))] if dig(recipe, "task", "stop") else []),
    ]


def _tests(sweep: Sweep) -> list[Item]:
    split, primary, measure = dig(sweep.recipe, "task", "split"), sweep.told("verdict", "primary"), measure_of(sweep.rows)
    opened = sweep.told("test_opened")
    ratios = "differences, TIR and Recovery" if measure is ACCURACY else "differences and Recovery"
    times = "once" if opened == 1 else f"{opened} times"
    guards = sweep.told("guard_tests_opened")
    of_guards = f"; of the guards: {text(guards)}" if guards else ""
    return [
        ("splits", f"{text(split)}; disjoint: rank on probe, choose on select, confirm on test"),
        ("test split opened", f"{times} so far, this run included{of_guards}" if isinstance(opened, int) else NOT_RECORDED),
        ("winner", f"{primary}, named beforehand" if primary else f"{WINNER_RULE}{_objective(sweep)}"),
        (
            "intervals",
            f"{measure.interval}, 95 %, of {'an accuracy' if measure is ACCURACY else 'a mean loss'}; paired bootstrap over "
            f"examples ({RESAMPLES:,} resamples, seed {text(dig(split, 'seed'))}) of {ratios}",
        ),
        (
            "verdict",
            f"on test, in fixed sequence, each at {ALPHA}: {measure.test} against the target; against arms of random sets, chosen "
            "by the same rule; guards within their margins",
        ),
        ("arms", _arms(sweep)),
        ("close calls", _close(sweep)),
    ]


def _arms(sweep: Sweep) -> str:
    arms = sweep.told("verdict", "arms")
    if not isinstance(arms, dict):
        return "none"
    reached = arms.get("scores_on_test") or []
    return f"{len(reached)} of {arms.get('sets_each')} sets each; on test: {', '.join(number(abs(score)) for score in reached)}"


def _close(sweep: Sweep) -> str:
    n, close = sweep.told("close", "n"), sweep.told("close", "close")
    return NOT_RECORDED if n is None else f"rounding may have decided {count(close)} of {count(n)} answers on select"


def _grid(sweep: Sweep) -> list[Item]:
    roles = Counter(row.role for row in sweep.on("select"))
    grid = dig(sweep.recipe, "sweep")
    names = ("k", "kind", "alpha", "channels", "controls", "screen", "race", "arms")
    return [
        ("rankers", text(dig(sweep.recipe, "rank", "by"))),
        ("trajectory", text(dig(sweep.recipe, "rank", "trajectory"))),
        *((name, text(dig(grid, name))) for name in names if dig(grid, name) is not None),
        ("searches", _searches(sweep)),
        ("variants", ", ".join(f"{n} {role}" for role, n in roles.items()) or NOTHING),
        ("stopped early", text(sweep.told("stopped"))),
        ("left out", _excluded(sweep.told("excluded"))),
    ]


def _objective(sweep: Sweep) -> str:
    """How guards had a say; nothing where they had none."""
    objective = dig(sweep.recipe, "sweep", "objective")
    if not isinstance(objective, dict):
        return ""
    veto = ", and none that loses more than its margin" if objective.get("veto") else ""
    return f"; best by score less {text(objective.get('price'))} × the mean loss on guards that are not held out{veto}"


def _searches(sweep: Sweep) -> str:
    """What was fitted: so many numbers, and what rounding them cost the task and what is kept, on the probe set."""
    found = sweep.told("searches")
    if not isinstance(found, dict) or not found:
        return NOTHING
    told = [(name, result) for name, results in found.items() if isinstance(results, list) for result in results]
    return "; ".join(
        f"{name} λ = {text(dig(result, 'penalty'))}: {text(dig(result, 'num_coefficients'))} numbers, "
        f"{_rounded(result, 'task_loss')}, {_rounded(result, 'guard_loss')}"
        for name, result in told
    )


def _rounded(found: Any, loss: str) -> str:
    before, after = number(dig(found, f"{loss}_before_rounding")), number(dig(found, loss))
    return f"{loss.replace('_', ' ')} {before} before rounding and {after} after"


def _excluded(excluded: Any) -> str:
    if not isinstance(excluded, list) or not excluded:
        return "no module"
    reasons = Counter(str(dig(entry, "reason")) for entry in excluded)
    return f"{len(excluded)} modules: " + ", ".join(f"{n} × {reason}" for reason, n in reasons.most_common(5))


def _run(sweep: Sweep) -> list[Item]:
    seconds = sweep.told("seconds")
    stages = [f"{stage} {number(value, 1)}" for stage, value in seconds.items()] if isinstance(seconds, dict) else []
    places = sweep.told("places")
    devices = [f"{role} on {text(dig(place, 'device'))}" for role, place in places.items()] if isinstance(places, dict) else []
    return [
        ("versions", text(sweep.told("environment"))),
        ("places", _joined(devices)),
        ("dtype", text(dig(sweep.recipe, "resources", "dtype"))),
        ("rows per step", text(sweep.told("rows_per_step"))),
        ("seconds", _joined(stages)),
        ("recipe", text(sweep.told("recipe"))),
        ("MLflow run", text(sweep.told("mlflow_run"))),
    ]


def _joined(parts: Sequence[str]) -> str:
    return ", ".join(parts) or NOT_RECORDED


def _model(model: Any) -> str:
    if not isinstance(model, dict):
        return NOT_RECORDED
    revision = model.get("revision")
    return f"{model.get('model')}{f' at revision {revision}' if revision else ''}"
