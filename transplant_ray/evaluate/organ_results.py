"""Rows of an organ sweep: what each model lost on the two texts, and what it answered to the tasks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pyarrow as pa

from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.evaluate.outcome import Tally

ORGAN_SCHEMA = pa.schema(
    [
        ("label", pa.string()), ("variant", pa.string()), ("role", pa.string()), ("organ", pa.string()), ("mode", pa.string()),
        ("at", pa.int64()), ("split", pa.string()), ("num_layers", pa.int64()), ("num_put", pa.int64()),
        ("num_parameters", pa.int64()), ("seconds", pa.float64()),
        *(
            (f"{text}_{what}", kind)
            for text in ("domain", "general")
            for what, kind in (
                ("n", pa.int64()), ("loss", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()),
                ("perplexity", pa.float64()),
            )
        ),
        ("winner", pa.bool_()), ("vetoed", pa.bool_()), ("error", pa.string()),
    ]
)  # fmt: skip
TASK_SCHEMA = pa.schema(
    [
        ("label", pa.string()), ("variant", pa.string()), ("role", pa.string()), ("task", pa.string()), ("split", pa.string()),
        ("n", pa.int64()), ("accuracy", pa.float64()), ("loss", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class OrganResult:
    """One model on one half of the texts; losses in nats a token, their intervals Student's at 95 % over blocks."""

    label: str
    variant: str
    """Equal for models of the same layers."""
    role: str
    organ: str | None
    mode: str | None
    at: int | None
    split: str
    num_layers: int
    num_put: int
    """Layers that are not the recipient's."""
    num_parameters: int
    seconds: float
    domain_n: int = 0
    domain_loss: float | None = None
    domain_ci_low: float | None = None
    domain_ci_high: float | None = None
    domain_perplexity: float | None = None
    general_n: int = 0
    general_loss: float | None = None
    general_ci_low: float | None = None
    general_ci_high: float | None = None
    general_perplexity: float | None = None
    winner: bool = False
    vetoed: bool = False
    """Whether it loses more on general text than a winner may."""
    error: str | None = None


@dataclass(frozen=True)
class TaskResult:
    label: str
    variant: str
    role: str
    task: str
    split: str
    n: int
    accuracy: float | None
    """None where losses are what is scored."""
    loss: float | None
    ci_low: float | None
    ci_high: float | None


def text_columns(text: str, tally: Tally | None) -> dict[str, float | int | None]:
    """The columns of one text; of a model that has not read it, none."""
    if tally is None or tally.loss is None or not tally.n:
        return {}
    low, high = tally.interval or (None, None)
    found = {"n": tally.n, "loss": tally.loss, "ci_low": low, "ci_high": high, "perplexity": perplexity(tally.loss)}
    return {f"{text}_{what}": value for what, value in found.items()}


assert {field.name for field in fields(OrganResult)} == set(ORGAN_SCHEMA.names), "a row comes back as it was written"
assert {field.name for field in fields(TaskResult)} == set(TASK_SCHEMA.names), "a row comes back as it was written"
