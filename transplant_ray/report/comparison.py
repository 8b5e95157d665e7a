"""What a comparison of learners writes: tables of everything, and a page with what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.files import write_json
from transplant_ray.storage import RunFolder, write_rows

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
    files = [folder.results, folder.path / "positions.parquet", folder.summary]
    write_rows(files[0], [_result(said) for said in summary["learnt"]], RESULTS)
    write_rows(files[1], list(_positions(summary["learnt"])), POSITIONS)
    write_json(files[2], dict(summary))
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


COLUMNS = ("model", "method", "lr", "domain", "general", "trained", "to ship", "training", "put in")


def method_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of methods as text, in the order of `COLUMNS`: for each model it as it is, then every method."""
    edges = {(choice["model"], choice["method"]) for choice in summary["choices"] if choice["at_edge"]}
    rows = []
    for model in summary["models"]:
        before = next(said for said in summary["learnt"] if said["model"] == model and said["method"] == "before")
        shown = [_perplexity(before["test"][text], None) for text in TEXTS]
        rows.append((model, "before", "", *shown, "", "", "", ""))
        for said in summary["standings"]:
            if said["model"] == model:
                edge = " (edge)" if (model, said["method"]) in edges else ""
                perplexities = [_perplexity(said["loss"][text], said["interval"][text]) for text in TEXTS]
                rows.append(
                    (
                        model, said["method"], f"{said['lr']:g}{edge}", *perplexities, f"{said['parameters']:,}",
                        _size(said["bytes"]), f"{said['seconds']:.3g} s", _sites(said["sites"]),
                    )
                )  # fmt: skip
    return rows


def _perplexity(loss: float | None, interval: Sequence[float] | None) -> str:
    if loss is None:
        return ""
    ends = "" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]"
    return f"{_number(loss)}{ends}"


def _number(loss: float) -> str:
    """A perplexity, of a loss."""
    value = perplexity(loss)
    return "∞" if value is None else f"{value:.4g}"


def _size(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def _sites(sites: Sequence[str]) -> str:
    return ", ".join(f"{site} × {number}" if number > 1 else site for site, number in Counter(sites).items())
