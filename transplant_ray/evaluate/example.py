"""An example of a task, as text and as token ids. What computes with examples needs this file and no reader of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["probe", "select", "test"]


@dataclass(frozen=True)
class Example:
    id: str
    """Content hash of prompt and answer."""
    prompt: str
    answer: str


@dataclass(frozen=True)
class Rendered:
    """An example as token ids, by the target's tokenizer."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The reference answer with its end token."""
    answer: str
