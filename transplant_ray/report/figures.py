"""Figures with their captions, in the order of the page: every caption says n, seed and interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup
from matplotlib.figure import Figure

from transplant_ray.report.costs import COSTS, measured_costs, trade_off
from transplant_ray.report.curves import Across, comparable, curve_panel, headline, k_curves, kinds, over_k, over_moved
from transplant_ray.report.look import BASELINES, CONTROLS, UNIFORM, WINNER, Look, looks
from transplant_ray.report.records import Row, measure_of
from transplant_ray.report.scores import changed_map, depth_panel, heat_map
from transplant_ray.report.svg import inline_svg
from transplant_ray.report.sweep import Sweep, dig, read_scores, read_table
from transplant_ray.storage import RunFolder

TRIVIAL = ("depth", "random")
"""Rankers whose scores are positions: a map of them says nothing."""


@dataclass(frozen=True)
class Plot:
    """One or several panels under one caption."""

    panels: Sequence[Markup]
    caption: str


def headline_plot(sweep: Sweep) -> Plot | None:
    """None without a winner."""
    winner = sweep.winner
    if winner is None or winner.value is None:
        return None
    measure = measure_of(sweep.rows)
    others = {role: sweep.baseline(role, winner.split) for role in ("target", "all", "source")}
    rows = [row for row in (others["target"], winner, others["all"], others["source"]) if row is not None]
    told = "; ".join(f"{BASELINES[r.role][0] if r is not winner else 'winner'} {r.value:.3f}" for r in rows if r.value is not None)
    where = "of the exported checkpoint, reloaded" if winner.split == "test" else "of the winner, which was chosen on them"
    caption = f"{winner.split.capitalize()}, n = {winner.n}, {where}. Bars are 95 % {measure.interval} intervals."
    return Plot([inline_svg(headline(rows), "headline", f"{measure.name.capitalize()} on {winner.split}: {told}")], caption)


def curve_plots(sweep: Sweep) -> list[Plot]:
    """Over K, and over ‖ΔW‖ where that was measured."""
    rows = sweep.rows
    every = comparable(rows)
    trials = [row for row in every if row.role == "trial"]
    if not trials:
        return []
    n, seed, seeds = every[0].n, _seed(sweep), len({row.seed for row in every if row.ranker == "random" and row.k is not None})
    star = " The star is the winner, which was chosen on these numbers." if any(row.winner for row in trials) else ""
    measure = measure_of(rows)
    base = f"Select, n = {n}, split seed {seed}. Bands: 95 % {measure.interval} intervals.{star}"
    left_out = sum(row.role == "trial" for row in sweep.on("select")) - len(trials)
    absent = f" {left_out} trials that failed or were stopped early are in the table alone." if left_out else ""
    random = f" Grey: random sets ({seeds} seeds; the line is their mean, the area their range) and depth order." if seeds else ""
    plots = [Plot(_panels(rows, "k", over_k, "K"), f"{measure.name.capitalize()} over K, one panel a kind. {base}{random}{absent}")]
    if any(row.moved is not None for row in trials):
        merge = "The grey diamonds are plain merges of all modules at a uniform alpha."
        caption = f"The same over the share of ‖ΔW‖ that is moved: equal distance from the target, not equal count. {merge} {base}"
        plots.append(Plot(_panels(rows, "moved", over_moved, "the share of ‖ΔW‖ moved"), caption))
    return plots


def score_plots(sweep: Sweep) -> list[tuple[str, Plot]]:
    """Ranker → its heat map and its scores against depth."""
    winner = sweep.winner
    plots = []
    for index, (ranker, scores) in enumerate(sweep.scores.items()):
        if ranker in TRIVIAL:
            continue
        marked = frozenset(sweep.coefficients) if winner is not None and winner.ranker == ranker else frozenset()
        dots = " Dots are the winner's modules." if marked else ""
        top = scores[0]
        title = f"Scores by {ranker} by layer and projection; highest {top.score:.3g} at layer {top.layer}, {top.projection}"
        panels = [
            inline_svg(heat_map(scores, marked), f"map{index}", title),
            inline_svg(depth_panel(scores), f"depth{index}", f"Scores by {ranker} over layer"),
        ]
        plots.append((ranker, Plot(panels, f"{len(scores)} modules.{dots}{_probed(sweep, ranker)}")))
    return plots


def cost_plots(sweep: Sweep) -> list[Plot]:
    """Gain against guards and against KL, as far as they were measured."""
    every = comparable(sweep.rows)
    plots = []
    for name in measured_costs(sweep.rows):
        caption = (
            f"Up is gain, left is unharmed. Select, n = {every[0].n}, split seed {_seed(sweep)}; the intervals are in the table of "
            "variants. Dotted: a search along λ, its front of gain against damage. Grey dots: random sets; the diamonds: plain "
            "merges at a uniform alpha, from the target to all swapped."
        )
        plots.append(
            Plot([inline_svg(trade_off(sweep.rows, COSTS[name]), f"cost-{name}", f"Gain against {COSTS[name].axis}")], caption)
        )
    return plots


def changed_plot(sweep: Sweep) -> Plot | None:
    """None where the run does not hold the winner's coefficients, or no ranking says where its modules are."""
    scores = next(iter(sweep.scores.values()), None)
    if not sweep.coefficients or scores is None:
        return None
    title = f"The winner changes {len(sweep.coefficients)} of {len(scores)} modules"
    caption = "Coefficient of every compatible module: white is the target's weight, blue the source's, between them a blend."
    return Plot([inline_svg(changed_map(scores, sweep.coefficients), "changed", title)], caption)


def legend(rows: Sequence[Row], *, lines: bool, merges: bool) -> list[tuple[str, Markup]]:
    """Name → swatch: of trials and controls, of the baselines where there are `lines`, of plain `merges` where they are drawn."""
    every = comparable(rows)
    controls = {row.ranker for row in every if row.role == "control"} - (set() if merges else {"uniform"})
    styles = list(looks(rows).items())
    styles += [CONTROLS[ranker] for ranker in CONTROLS if ranker in controls]
    styles += [BASELINES[role] for role in BASELINES if lines and any(row.role == role for row in every)]
    styles += [("winner", WINNER)] if any(row.winner for row in every) else []
    return [(name, swatch(look if lines or look is UNIFORM else replace(look, line=""))) for name, look in styles]


def tracking_figures(folder: RunFolder) -> dict[str, Figure]:
    """Name → figure, for MLflow: the K-curves, and a heat map per ranker."""
    maps = {f"scores_{ranker}": heat_map(scores) for ranker, scores in read_scores(folder.rankings).items()}
    return {"k_curves": k_curves(read_table(folder)[1]), **maps}


SHAPES = {
    "o": '<circle cx="14" cy="7" r="4"/>',
    ".": '<circle cx="14" cy="7" r="3"/>',
    "s": '<rect x="10.5" y="3.5" width="7" height="7"/>',
    "^": '<path d="M14 2.5l4.6 8.5h-9.2z"/>',
    "v": '<path d="M14 11.5l4.6-8.5h-9.2z"/>',
    "D": '<path d="M14 2l5 5-5 5-5-5z"/>',
    "d": '<path d="M14 1.5l3.5 5.5-3.5 5.5-3.5-5.5z"/>',
    "P": '<path d="M12 2.5h4v2.5h2.5v4h-2.5v2.5h-4v-2.5h-2.5v-4h2.5z"/>',
    "X": '<path d="M10 5l2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z"/>',
    "h": '<path d="M14 2l4.4 2.5v5l-4.4 2.5-4.4-2.5v-5z"/>',
    "*": '<path d="M14 .5l1.8 4.3 4.7.4-3.6 3 1.1 4.6-4-2.5-4 2.5 1.1-4.6-3.6-3 4.7-.4z"/>',
    "": "",
}
DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2.5 1.5 2.5"}


def swatch(look: Look) -> Markup:
    """Of a legend."""
    dash = f' stroke-dasharray="{DASHES[look.line]}"' if DASHES.get(look.line) else ""
    line = f'<path d="M1 7h26" fill="none" stroke-width="2"{dash}/>' if look.line and look.marker != "." else ""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true" fill="{look.colour}" stroke="{look.colour}" stroke-width="0">'
        f"{line}{SHAPES[look.marker]}</svg>"
    )


def _panels(rows: Sequence[Row], name: str, across: Across, what: str) -> list[Markup]:
    return [
        inline_svg(
            curve_panel(rows, kind, across),
            f"{name}{index}",
            f"{measure_of(rows).name.capitalize()} on select over {what}, kind {kind}",
        )
        for index, kind in enumerate(kinds(comparable(rows)))
    ]


def _probed(sweep: Sweep, ranker: str) -> str:
    told = sweep.told("rankings", "by_ranker", ranker)
    steady, depth = dig(told, "stability"), dig(told, "spearman_with_depth")
    found = "" if depth is None else f" Rank correlation with depth {depth:+.2f}"
    if dig(steady, "spearman") is not None:
        found += (
            f"; with itself over {steady['resamples']} resamples of n = {steady['num_examples']} probe examples "
            f"(seed {steady['seed']}) {steady['spearman']:.2f}"
        )
    return f"{found}." if found else ""


def _seed(sweep: Sweep) -> str:
    seed = dig(sweep.recipe, "task", "split", "seed")
    return "not recorded" if seed is None else str(seed)
