"""What every part of a recipe has in common, and checks that several of them make."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

Kind = str
"""`attn`, `ffn`, `all`, or one projection such as `down_proj`."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which would count as 1."""
        expected = cls.model_fields[str(info.field_name)].annotation
        if expected is not bool and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false are not expected here")
        return value


def one_of(value: str, known: Sequence[str], what: str) -> str:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise ValueError(f"unknown {what} {value!r}; expected one of {list(known)}{f' (nearest: {near[0]})' if near else ''}")
    return value


def grid_axis(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("at least one value is needed")
    return distinct(values)


def distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{list(values)} has a value twice")
    return tuple(values)
