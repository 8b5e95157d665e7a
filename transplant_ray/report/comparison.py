"""What a comparison of learners writes: tables of everything, and a page with what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from transplant_ray.errors import RunError
from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.files import write_json, write_text
from transplant_ray.report.comparison_figures import NAMES, positions, rates, swatch, trade
from transplant_ray.report.svg import inline_svg
from transplant_ray.report.tables import escape_latex, to_csv
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows

HERE = Path(__file__).parent
KIND = "comparison"
"""Of a summary, where a comparison wrote it."""
NEEDED = ("name", "models", "budget", "text", "said", "choices", "standings", "differences", "contrasts", "learnt", "environment")
"""Of a summary, to make everything else of it."""
TEXTS = ("domain", "general")
RESULTS = pa.schema(
    [("key", pa.string()), ("model", pa.string()), ("method", pa.string()), ("stage", pa.string()), ("lr", pa.float64()),
     ("seed", pa.int64()), ("select_loss", pa.float64()), ("domain_loss", pa.float64()), ("general_loss", pa.float64()),
     ("domain_perplexity", pa.float64()), ("general_perplexity", pa.float64()), ("site", pa.string()),
     ("parameters", pa.int64()), ("bytes", pa.int64()), ("seconds", pa.float64()), ("memory", pa.int64()),
     ("tokens", pa.int64()), ("error", pa.string())]
)  # fmt: skip
POSITIONS = pa.schema(
    [("model", pa.string()), ("stage", pa.string()), ("lr", pa.float64()), ("seed", pa.int64()), ("mode", pa.string()),
     ("at", pa.int64()), ("select_loss", pa.float64())]
)  # fmt: skip


def write_comparison(folder: RunFolder, summary: Mapping[str, Any]) -> list[Path]:
    """All files of a finished comparison; returns them."""
    positions = folder.path / "positions.parquet"
    write_rows(folder.results, [_result(said) for said in summary["learnt"]], RESULTS)
    write_rows(positions, _positions(summary["learnt"]), POSITIONS)
    write_json(folder.summary, dict(summary))
    return [folder.results, positions, folder.summary, *_write_reports(folder, summary)]


def build_comparison_report(folder: RunFolder) -> Path:
    """Write `report.html`, `comparison.csv` and `comparison.tex` again, of the summary alone; returns the first."""
    return _write_reports(folder, read_comparison(folder))[0]


def read_comparison(folder: RunFolder) -> Mapping[str, Any]:
    """The summary of a comparison; RunError where it is not whole."""
    summary = folder.read_summary()
    if missing := [name for name in NEEDED if name not in summary]:
        raise RunError(
            f"{folder.summary}: not the whole summary of a comparison ({missing[0]!r} is missing). Run the comparison again: what "
            "has been trained is kept."
        )
    return summary


def _write_reports(folder: RunFolder, summary: Mapping[str, Any]) -> list[Path]:
    files = [folder.report, folder.path / "comparison.csv", folder.path / "comparison.tex"]
    table = [{"label": f"{said['model']} {said['method']}", **_result(said)} for said in summary["learnt"]]
    for path, text in zip(files, (render(summary), to_csv(table), to_latex(summary)), strict=True):
        write_text(path, text)
    return files


def _result(said: Mapping[str, Any]) -> dict[str, Any]:
    losses = {text: said["test"][text] for text in TEXTS}
    row = {name: said[name] for name in RESULTS.names if name in said}
    row |= {f"{text}_loss": loss for text, loss in losses.items()}
    row |= {f"{text}_perplexity": None if loss is None else perplexity(loss) for text, loss in losses.items()}
    return {**row, "select_loss": said["select"]}


def _positions(learnt: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**{name: said[name] for name in ("model", "stage", "lr", "seed")}, "mode": site["mode"], "at": site["at"],
         "select_loss": site["loss"]}
        for said in learnt
        if said["method"] == "organ"
        for site in said["sites"]
    ]  # fmt: skip


COLUMNS = ("model", "method", "lr", "domain", "× before", "general", "× before", "trained", "to ship", "training", "put in")


def method_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of methods as text, in the order of `COLUMNS`: for each model it as it is, then every method."""
    edges = {(choice["model"], choice["method"]) for choice in summary["choices"] if choice["at_edge"]}
    rows = []
    for model in summary["models"]:
        before = _before(summary, model)
        shown = [text for each in TEXTS for text in (_perplexity(before[each], None), "")]
        rows.append((model, "before", "", *shown, "", "", "", ""))
        for said in summary["standings"]:
            if said["model"] == model:
                edge = " (edge)" if (model, said["method"]) in edges else ""
                shown = [
                    text
                    for each in TEXTS
                    for text in (_perplexity(said["loss"][each], said["interval"][each]), f"{_ratio(said['change'][each])}")
                ]
                rows.append(
                    (
                        model, NAMES[said["method"]], f"{said['lr']:g}{edge}", *shown, f"{said['parameters']:,}",
                        size(said["bytes"]), _seconds(said), sites(said["sites"]),
                    )
                )  # fmt: skip
    return rows


def to_latex(summary: Mapping[str, Any]) -> str:
    """The table of methods with booktabs rules."""
    caption = f"{summary['name']}: perplexity on test, with 95 % intervals over seeds. {budget(summary)}"
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\begin{{tabular}}{{ll{'r' * (len(COLUMNS) - 2)}}}",
            rf"\toprule {_latex_row(COLUMNS)} \midrule",
            *map(_latex_row, method_rows(summary)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_row(cells: Sequence[str]) -> str:
    written = (escape_latex(cell).replace("×", r"$\times$").replace("∞", r"$\infty$") for cell in cells)
    return " & ".join(written) + r" \\"


def render(summary: Mapping[str, Any]) -> str:
    """The whole page as HTML: one file that needs no network."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    models = list(summary["models"])
    shown = dict.fromkeys(said["method"] for said in summary["choices"])
    context = {
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "summary": summary,
        "headline": headline(summary),
        "budget": budget(summary),
        "columns": COLUMNS,
        "rows": method_rows(summary),
        "legend": [
            (NAMES.get(method, "the model as it is"), inline_svg(swatch(method), f"sign-{method}", method))
            for method in ("before", *shown)
        ],
        "trade": [
            inline_svg(trade(summary, model), f"trade-{n}", f"{model}: domain against general perplexity")
            for n, model in enumerate(models)
        ],
        "rates": [
            inline_svg(rates(summary, model), f"rates-{n}", f"{model}: perplexity by learning rate")
            for n, model in enumerate(models)
        ],
        "positions": [
            inline_svg(figure, f"positions-{mode}-{n}", f"{model}: perplexity by position, {mode}")
            for n, model in enumerate(models)
            for mode in ("insert", "replace")
            if (figure := positions(summary, model, mode)) is not None
        ],
        "contrasts": [_contrast(said) for said in summary["contrasts"]],
        "differences": [_difference(said) for said in summary["differences"]],
        "failures": [_failure(said) for said in summary["learnt"] if said["error"] is not None],
        "method": _method(summary),
    }
    return environment.get_template("comparison.html.jinja").render(**context)


def headline(summary: Mapping[str, Any]) -> str:
    """What the organ came to on domain text, against each of the others; without one, or on several models, what was compared."""
    found = [said for said in summary["differences"] if said["text"] == "domain" and said["first"] == "organ"]
    if len(summary["models"]) == 1 and found and all(said["interval"] for said in found):
        ways = {"better than": [], "worse than": [], "not told apart from": []}  # type: dict[str, list[str]]
        for said in found:
            low, high = said["interval"]
            way = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
            ways[way].append(NAMES[said["second"]])
        return f"On domain text the organ is {'; '.join(f'{way} {_listed(names)}' for way, names in ways.items() if names)}"
    methods = [NAMES[method] for method in dict.fromkeys(said["method"] for said in summary["choices"])]
    text = f"{_listed(methods)} on {len(summary['models'])} model{'s' if len(summary['models']) > 1 else ''}"
    return text[0].upper() + text[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def budget(summary: Mapping[str, Any]) -> str:
    """What every method had, in a sentence."""
    said = summary["budget"]
    return (
        f"Each method had the same {said['tokens']:,} tokens a training ({said['steps']:,} steps), "
        f"{said['trainings_to_tune']} trainings to tune its learning rate, and {len(said['seeds'])} "
        f"seed{'s' if len(said['seeds']) > 1 else ''} to confirm."
    )


def _contrast(said: Mapping[str, Any]) -> tuple[str, ...]:
    ends = _perplexity(said["early"], None), _perplexity(said["late"], None)
    return said["model"], said["mode"], *ends, f"{said['difference']:+.4f}", _nats(said["interval"]), said["verdict"]


def _difference(said: Mapping[str, Any]) -> tuple[str, ...]:
    within = "; ".join(f"{each['difference']:+.3f} ({_p(each['p'])})" for each in said["within"])
    pair = f"{NAMES[said['first']]} − {NAMES[said['second']]}"
    ends = _nats(said["interval"])
    return said["model"], said["text"], pair, f"{said['difference']:+.4f}", ends, str(said["n"]), within, _word(said["interval"])


def _word(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "one seed"
    return "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "not told apart"


def _failure(said: Mapping[str, Any]) -> str:
    return f"{said['model']}, {NAMES[said['method']]}, lr {said['lr']:g}, seed {said['seed']}: {said['error']}"


def _method(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    said = summary["budget"]
    shares = [
        (f"text, {model}", "; ".join(_text(name, text) for name, text in texts.items())) for model, texts in summary["text"].items()
    ]
    return [
        ("tuning", f"learning rate by select of domain text, with seed {said['tuning_seed']}, which is none of {said['seeds']}"),
        ("organ", "trained alone between frozen embedding and head; put in at the position and mode that select likes best, for "
         "each seed anew. That costs evaluations, not trainings, and is a choice that the others do not have"),
        ("in place", "the same layers, trained inside of the whole model: tells few layers from the wrapper"),
        ("LoRA", "beside every linear map of the layers, by peft; to ship is its adapter"),
        ("measured", "from what is shipped, loaded again, in float32; blocks are "
         f"{said['context']} tokens; test is opened for the seeds alone"),
        *shares,
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["environment"].items())),
    ]  # fmt: skip


def _text(name: str, said: Mapping[str, Any]) -> str:
    sides = ", ".join(
        f"{side} {each['blocks']:,} blocks of {each['documents']:,} documents"
        for side, each in said.items()
        if isinstance(each, Mapping) and each["blocks"]
    )
    both = f"; {said['also_trained_on']} documents are also trained on" if said["also_trained_on"] else ""
    return f"{name}: {sides}{both}"


def _before(summary: Mapping[str, Any], model: str) -> Mapping[str, float]:
    said = next(said for said in summary["learnt"] if said["model"] == model and said["method"] == "before")
    losses: Mapping[str, float] = said["test"]
    return losses


def _ratio(change: float) -> str:
    value = perplexity(change)
    return _short(value, 3)


def _nats(interval: Sequence[float] | None) -> str:
    return "one seed" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _perplexity(loss: float | None, interval: Sequence[float] | None) -> str:
    if loss is None:
        return ""
    ends = "" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]"
    return f"{_number(loss)}{ends}"


def _seconds(said: Mapping[str, Any]) -> str:
    """Of a standing; comparisons of earlier versions have no interval."""
    interval = said.get("seconds_interval")
    ends = "" if interval is None else f" [{_short(interval[0], 3)}, {_short(interval[1], 3)}]"
    return f"{_short(said['seconds'], 3)} s{ends}"


def _number(loss: float) -> str:
    """A perplexity, of a loss."""
    value = perplexity(loss)
    return _short(value, 4)


def _short(value: float | None, digits: int) -> str:
    if value is None:
        return "∞"
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.{digits}g}"


def size(number: int) -> str:
    for unit, bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= bytes:
            return f"{number / bytes:.3g} {unit}"
    return f"{number} B"


def sites(found: Sequence[str]) -> str:
    """Where the organs of the seeds were put in."""
    return ", ".join(f"{site} × {number}" if number > 1 else site for site, number in Counter(found).items())
