"""Flips: the examples that the winner gained and those that it lost, with both completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transplant_ray.evaluate.example import Split
from transplant_ray.report.records import Answer, Asked

MOST_SHOWN = 20
"""Flips of either direction in the report."""
MOST_CHARACTERS = 300
"""Of a prompt or a completion."""
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
"""What a page would swallow or normalise gets a picture; tab and line feed stay."""
DIRECTIONS = {code: f"⟨U+{code:04X}⟩" for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Marks that would turn the text around them."""


@dataclass(frozen=True)
class Flip:
    example: str
    before: str
    """The target's completion."""
    after: str
    """The winner's."""
    prompt: str | None
    """None where the run does not hold its examples."""
    answer: str | None


@dataclass(frozen=True)
class Flips:
    split: Split
    n: int
    """Examples that both have answered."""
    gained: tuple[Flip, ...]
    """Wrong by the target, right by the winner; in the order of the data."""
    lost: tuple[Flip, ...]

    @property
    def without_prompts(self) -> bool:
        return any(flip.prompt is None for flip in (*self.gained, *self.lost))


def find_flips(split: Split, answers: Sequence[Answer], target: str, winner: str, asked: Sequence[Asked]) -> Flips | None:
    """None where one of the two has no answers, or losses instead of right and wrong ones."""
    before, after = ({a.example: a for a in answers if a.variant == name} for name in (target, winner))
    both = [example for example in before if example in after]
    if not both or any(before[example].loss is not None for example in both):
        return None
    examples = {row.example: row for row in asked}

    def flips(*, gained: bool) -> tuple[Flip, ...]:
        found = [e for e in both if before[e].correct != after[e].correct and after[e].correct == gained]
        return tuple(_flip(before[e], after[e], examples.get(e)) for e in found)

    return Flips(split, len(both), flips(gained=True), flips(gained=False))


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text as it can be read on a page: control characters visible, and the middle left out where it is long.

    The end stays: that is where an answer stands.
    """
    if len(text) <= most:
        return visible(text)
    head, tail = text[: most - most // 3], text[len(text) - most // 3 :]
    left_out = len(text) - len(head) - len(tail)
    return f"{visible(head)} […{left_out:,} characters left out…] {visible(tail)}"


def visible(text: str) -> str:
    """A text in which nothing hides."""
    return text.translate(CONTROL_PICTURES).translate(DIRECTIONS)


def _flip(before: Answer, after: Answer, asked: Asked | None) -> Flip:
    prompt, answer = (asked.prompt, asked.answer) if asked else (None, None)
    return Flip(before.example, before.completion, after.completion, prompt, answer)
