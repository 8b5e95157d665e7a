"""From the run folder of an organ sweep to its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from transplant_ray.errors import RunError
from transplant_ray.evaluate.organ_results import OrganResult, TaskResult
from transplant_ray.files import write_text
from transplant_ray.report import words
from transplant_ray.report.figures import Plot, swatch
from transplant_ray.report.look import WINNER
from transplant_ray.report.organ_curves import (
    RECIPIENT,
    control_look,
    curve_looks,
    drawable,
    ends_of,
    position_curves,
    position_panel,
)
from transplant_ray.report.page import Card, Headline, page_environment, stylesheet
from transplant_ray.report.svg import inline_svg
from transplant_ray.report.sweep import dig
from transplant_ray.report.tables import latex_cell, latex_name, longtable, to_csv
from transplant_ray.storage import RunFolder
from transplant_ray.tables import read_rows

KIND = "organs"
"""Of a summary, where an organ sweep wrote it."""
TEXTS = ("domain", "general")
MEANINGS: Mapping[str, tuple[str, str]] = {
    "confirmed": (
        "good",
        "The gain is there on text that nothing was chosen on, and the same layers untrained did worse. General text is not read "
        "measurably worse.",
    ),
    "confirmed, with loss": (
        "caution",
        "The gain is there on text that nothing was chosen on, and the same layers untrained did worse. But general text is read "
        "worse than before.",
    ),
    "gain, untrained layers not tested": (
        "caution",
        "The gain is real. Whether the training is the reason, or any layers at this place would do, was not tested.",
    ),
    "gain, not better than untrained layers": (
        "caution",
        "The gain is real, and the same layers at the same place do as well without having been trained.",
    ),
    "not distinguishable from the recipient": ("flat", "What was measured fits an organ that does nothing for this text."),
    "worse than the recipient": ("bad", "At its best place, the recipient reads this text worse with the organ than without it."),
}
"""Conclusion → how good the news is, and what it says to somebody who does not know the tests."""


@dataclass(frozen=True)
class OrganRun:
    """What a run folder holds."""

    rows: Sequence[OrganResult]
    tasks: Sequence[TaskResult]
    summary: Mapping[str, Any]
    recipe_text: str

    def on(self, split: str) -> list[OrganResult]:
        return [row for row in self.rows if row.split == split]

    @property
    def winner(self) -> OrganResult | None:
        return next((row for row in self.on("select") if row.winner), None)

    def told(self, *keys: str) -> Any:
        return dig(self.summary, *keys)


@dataclass(frozen=True)
class TestRow:
    """A comparison on the test half, as it is written."""

    what: str
    text: str
    n: int
    before: str
    after: str
    gain: str
    interval: str
    p: str


@dataclass(frozen=True)
class ModelLine:
    row: OrganResult
    domain: str
    domain_interval: str
    general: str
    general_interval: str


def build_organ_report(folder: RunFolder) -> Path:
    """Write `report.html`, `variants.csv` and `variants.tex` into a run folder; returns the first.

    RunError where its tables are missing.
    """
    run = read_organ_run(folder)
    write_text(folder.variants_csv, to_csv([asdict(row) for row in run.rows]))
    write_text(folder.variants_tex, to_latex(run))
    write_text(folder.report, render_organs(run))
    return folder.report


def to_latex(run: OrganRun) -> str:
    """Every model on both halves of the texts."""
    titles = ["model", "split", "domain", r"95\,\% interval", "general", r"95\,\% interval", "layers"]
    lines = []
    for line in map(_line, run.rows):
        name = latex_name(line.row.label, winner=line.row.winner)
        shown = (line.domain, line.domain_interval, line.general, line.general_interval)
        cells = ["failed", *[""] * 3] if line.row.error is not None else [latex_cell(text or words.NOTHING) for text in shown]
        lines.append([name, line.row.split, *cells, str(line.row.num_layers)])
    return longtable(titles, lines, f"Perplexity of all models of the organ sweep {run.told('name')}.")


def read_organ_run(folder: RunFolder) -> OrganRun:
    try:
        rows = [OrganResult(**row) for row in read_rows(folder.require(folder.results))]
        asked = [TaskResult(**row) for row in read_rows(folder.tasks)] if folder.tasks.exists() else []
    except TypeError as error:
        raise RunError(f"{folder.results}: not the results of an organ sweep ({error}). Run the sweep again.") from error
    recipe = folder.recipe.read_text(encoding="utf-8") if folder.recipe.exists() else ""
    return OrganRun(rows, asked, folder.read_summary(), recipe)


def position_figures(rows: Sequence[OrganResult]) -> dict[str, Figure]:
    """Name → figure, for MLflow."""
    return {"position_curve": position_curves(rows)}


def render_organs(run: OrganRun) -> str:
    """The whole page as HTML."""
    return (
        page_environment()
        .get_template("organs.html.jinja")
        .render(
            css=stylesheet(),
            name=run.told("name"),
            organs=list(run.told("organs") or {}),
            recipient=run.told("recipient", "model"),
            headline=_headline(run),
            cards=list(_cards(run)),
            cautions=list(_cautions(run)),
            legend=_legend(run),
            curves=_curves(run),
            tests=list(_tests(run)),
            agreement=_agreement(run),
            confidence=f"{100 * (1 - (run.told('level') or 0.05)):g} %",
            tasks=[_task_line(row) for row in run.tasks],
            described=list(_organs(run)),
            misfits=run.told("misfits") or [],
            groups=_groups(run),
            method=_method(run),
            recipe_text=run.recipe_text,
        )
    )


def _headline(run: OrganRun) -> Headline:
    conclusion = run.told("verdict", "conclusion")
    if isinstance(conclusion, str):
        tone, meaning = MEANINGS.get(conclusion, ("flat", ""))
        sentence = str(run.told("verdict", "sentence") or "")
        return Headline(tone, conclusion[:1].upper() + conclusion[1:], sentence[:1].upper() + sentence[1:], meaning)
    if run.winner is not None:
        return Headline("flat", "No verdict", "The winner or the recipient could not be measured on the test half.", "")
    vetoed = len(run.told("vetoed") or [])
    why = f"all {vetoed} that answered lose more on general text than is put up with" if vetoed else "no trial answered"
    return Headline("bad", "No winner", f"There is nothing to choose from: {why}.", "What was measured is below.")


def _cards(run: OrganRun) -> Iterator[Card]:
    winner = run.winner
    if winner is None:
        return
    yield Card("Winner", f"{winner.mode} {winner.at}", "", f"organ {winner.organ}, chosen on select")
    for text in TEXTS:
        found = run.told("confirmed", "texts", text)
        if found is not None:
            title = f"Perplexity, {text} text"
            ends = [_perplexity(dig(found, key)) for key in ("before_perplexity", "after_perplexity")]
            yield Card(title, ends[1], f"recipient {ends[0]}", f"test, n = {dig(found, 'n')} blocks, p = {_p(dig(found, 'p'))}")
    control = run.told("confirmed", "untrained")
    if control is None:
        why = run.told("organs", str(winner.organ), "without_control") or "not asked for"
        yield Card("Same layers untrained", "not measured", "", str(why), measured=False)
    else:
        note = f"domain text, test; the winner gains {_signed(dig(control, 'difference'))} nats a token on it"
        yield Card("Same layers untrained", _perplexity(dig(control, "before_perplexity")), "", note)
    yield Card(
        "Layers", str(winner.num_layers), "", f"{winner.num_put} of them put in; {words.count(winner.num_parameters)} parameters"
    )
    if (alone := _alone(run)) is not None:
        yield Card("Organ alone", _perplexity(alone.domain_perplexity), "", "domain text, select: between embedding and head")


def _alone(run: OrganRun) -> OrganResult | None:
    """The winner's organ between embedding and head, where that was measured."""
    organ = None if run.winner is None else run.winner.organ
    return next(
        (row for row in run.on("select") if row.role == "alone" and row.organ == organ and row.domain_loss is not None), None
    )


def _cautions(run: OrganRun) -> Iterator[str]:
    opened = max((run.told("confirmed", "test_opened") or {"": 0}).values(), default=0)
    if opened > 1:
        yield f"These test halves were opened {opened} times under this storage: each look makes a chance finding more likely."
    if failed := run.told("failed"):
        yield f"{len(failed)} models could not be measured; the reasons are in the table."
    blocks = [run.told("texts", text, "test", "blocks") for text in TEXTS]
    if any(isinstance(number, int) and number < 30 for number in blocks):
        yield f"The test halves have {' and '.join(map(str, blocks))} blocks: tests of so few lean on differences being normal."
    alone = _alone(run)
    if run.winner is not None and alone is not None and (alone.domain_loss or 0) <= (run.winner.domain_loss or 0):
        yield (
            f"On the select half of the domain text organ {alone.organ} alone, with no layer of the recipient, does as well as the "
            f"winner ({_perplexity(alone.domain_perplexity)} against {_perplexity(run.winner.domain_perplexity)})."
        )
    if run.winner is not None:
        yield "Blocks of one document follow one another, so neighbours are alike; the tests take blocks as independent."


def _legend(run: OrganRun) -> list[tuple[str, Any]]:
    looks = curve_looks(run.rows)
    untrained = {(row.organ, row.mode) for row in run.on("select") if row.role == "untrained"}
    entries = [(f"{organ}, {mode}", look) for (organ, mode), look in looks.items()]
    entries += [
        (f"{organ} untrained, {mode}", control_look(look)) for (organ, mode), look in looks.items() if (organ, mode) in untrained
    ]
    entries.append(RECIPIENT)
    entries += [("winner", WINNER)] if run.winner is not None else []
    return [(name, swatch(look)) for name, look in entries]


def _curves(run: OrganRun) -> Plot | None:
    if not any(row.role == "trial" for row in drawable(run.rows, "domain")):
        return None
    panels = [
        inline_svg(
            position_panel(run.rows, text), f"position-{text}", f"Perplexity on the select half of the {text} text over position"
        )
        for text in TEXTS
    ]
    numbers = ", ".join(f"{run.told('texts', text, 'select', 'blocks')} blocks of {text} text" for text in TEXTS)
    star = " The star is the winner, which was chosen on the domain panel." if run.winner is not None else ""
    alone = [row for row in run.on("select") if row.role == "alone" and row.domain_perplexity is not None]
    apart = (
        f" An organ alone is not drawn: {'; '.join(f'{r.label} {_perplexity(r.domain_perplexity)}' for r in alone)} on domain text."
        if alone
        else ""
    )
    context = run.told("texts", "domain", "context")
    caption = (
        f"Select half: {numbers}, of {context} tokens. Everything in this figure was looked at while choosing. Bands are 95 % "
        f"Student intervals over blocks.{star}{apart}"
    )
    return Plot(panels, caption)


def _tests(run: OrganRun) -> Iterator[TestRow]:
    for text in TEXTS:
        if (found := run.told("confirmed", "texts", text)) is not None:
            yield _test_row("recipient → winner", text, found)
    if (found := run.told("confirmed", "untrained")) is not None:
        yield _test_row("same layers untrained → winner", "domain", found)


def _test_row(what: str, text: str, found: Any) -> TestRow:
    return TestRow(
        what,
        text,
        dig(found, "n"),
        _perplexity(dig(found, "before_perplexity")),
        _perplexity(dig(found, "after_perplexity")),
        _signed(dig(found, "difference")),
        words.between(dig(found, "low"), dig(found, "high"), _signed) or words.NOTHING,
        _p(dig(found, "p")),
    )


def _agreement(run: OrganRun) -> str | None:
    found = run.told("confirmed", "exported_agrees")
    if found is None:
        return None
    equal, n = dig(found, "equal"), dig(found, "n")
    rest = "" if equal == n else f"; the largest difference is {dig(found, 'largest'):.2g} nats a token"
    return f"on {equal} of {n} select blocks its loss is that of the resident model, bit for bit{rest}"


def _task_line(row: TaskResult) -> dict[str, Any]:
    value = row.loss if row.accuracy is None else row.accuracy
    return {**asdict(row), "value": words.number(value), "interval": words.between(row.ci_low, row.ci_high)}


def _organs(run: OrganRun) -> Iterator[dict[str, Any]]:
    for name, told in (run.told("organs") or {}).items():
        yield {"name": name, **told, "control": told.get("without_control") or "measured beside"}


def _groups(run: OrganRun) -> list[tuple[str, list[ModelLine]]]:
    names = {"recipient": "recipient", "trial": "trials", "untrained": "untrained controls", "alone": "organs alone"}
    return [
        (title, [_line(row) for row in _best_first(rows)])
        for role, title in names.items()
        if (rows := [row for row in run.on("select") if row.role == role])
    ]


def _best_first(rows: Sequence[OrganResult]) -> list[OrganResult]:
    return sorted(rows, key=lambda row: (row.error is not None, row.domain_loss is None, row.domain_loss or 0.0))


def _line(row: OrganResult) -> ModelLine:
    cells = [(_perplexity(getattr(row, f"{text}_perplexity")), _interval(row, text)) for text in TEXTS]
    return ModelLine(row, *cells[0], *cells[1])


def _interval(row: OrganResult, text: str) -> str:
    ends = ends_of(row, text)
    return "" if ends is None else words.between(*ends, _perplexity)


def _method(run: OrganRun) -> dict[str, list[tuple[str, str]]]:
    environment = run.told("environment") or {}
    texts = {f"{name} text": _text(told) for name, told in (run.told("texts") or {}).items()}
    recipient = run.told("recipient") or {}
    return {
        "Models": [
            ("recipient", f"{recipient.get('model')}, {recipient.get('num_layers')} layers, {recipient.get('family')}"),
            ("its fingerprint", str(recipient.get("fingerprint"))[:16]),
            *((f"organ {name}", f"fingerprint {dig(told, 'fingerprint')}") for name, told in (run.told("organs") or {}).items()),
            ("arithmetic", words.text(run.told("dtype"))),
        ],
        "Text": [
            *texts.items(),
            ("halves", "by the hash of what a document says; no seed"),
        ],
        "Choice and tests": [
            ("rule", words.text(run.told("rule"))),
            ("level", words.text(run.told("level"))),
            ("intervals", "Student's, over blocks; paired t-tests of blocks on the test half"),
            (
                "multiplicity",
                "tests in a fixed order: against the recipient, only then against the untrained layers, and only then whether "
                "general text is read worse",
            ),
        ],
        "Run": [
            (
                "measured",
                f"{words.count(run.told('measured'))} blocks and examples; {words.count(run.told('recalled'))} from the ledger",
            ),
            ("seconds", words.text(run.told("seconds"))),
            ("processes", f"{words.count(run.told('processes'))}, each with the weights once"),
            *((name, str(version)) for name, version in environment.items()),
        ],
    }


def _text(told: Any) -> str:
    """Of one of the texts: where it is from, how much of it was read, and what it says by its hash."""
    blocks = [dig(told, split, "blocks") for split in ("select", "test")]
    return (
        f"{words.text(dig(told, 'spec', 'data'))}, share {words.text(dig(told, 'spec', 'share'))}; {blocks[0]} blocks to choose by "
        f"and {blocks[1]} to confirm on, of {dig(told, 'context')} tokens; SHA-256 {str(dig(told, 'sha256'))[:16]}"
    )


def _perplexity(value: Any) -> str:
    if not isinstance(value, int | float):
        return words.NOTHING
    return f"{value:.2f}" if value < 1_000 else f"{value:,.0f}" if value < 1_000_000 else f"{value:.2e}"


def _signed(value: Any) -> str:
    return f"{value:+.4f}" if isinstance(value, int | float) else words.NOTHING


def _p(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else words.NOTHING
