"""Text that is read as it comes, document after document: what organs are trained on and held against."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from pydantic import Field, field_validator

from transplant_ray.recipe.part import Part
from transplant_ray.recipe.tasks import HubData

HUB = "hub:"
"""Begins data of the hub, where one line says it: `hub:openai/gsm8k?name=main&split=train`."""


class CorpusSpec(Part):
    data: tuple[str | HubData, ...] = Field(min_length=1)
    """JSONL or Parquet files, plain text files, folders of them, patterns such as `docs/**/*.md`, or hub datasets."""
    text: str = "{text}"
    """Template over the columns of JSONL, Parquet and hub data."""
    share: tuple[float, float] = (0.0, 1.0)
    """Of the documents, by the hash of what they say: from and to. `[0, 0.2]` of a file has nothing in common with `[0.2, 1]`."""

    @field_validator("data", mode="before")
    @classmethod
    def _spell_out(cls, value: object) -> object:
        values = value if isinstance(value, list | tuple) else (value,)
        return tuple(_hub_data(each) if isinstance(each, str) and each.startswith(HUB) else each for each in values)

    @field_validator("share")
    @classmethod
    def _a_stretch(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("expected two numbers from 0 to 1, the second larger")
        return value


class MeasuredSpec(CorpusSpec):
    """Text on which perplexity is measured: half of its documents choose, and the other half confirms."""

    contexts: int = Field(128, ge=2)
    """At most so many are read, of each half."""


def _hub_data(text: str) -> dict[str, Any]:
    path, _, query = text.removeprefix(HUB).partition("?")
    return {"path": path, "split": "train", **dict(parse_qsl(query))}
