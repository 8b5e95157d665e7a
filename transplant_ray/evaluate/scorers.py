r"""Scorers: functions from a completion and the reference answer to a grade.

Each reads an answer out of the completion in its own way, and out of the reference likewise, so that a reference may be a whole
solution or the bare answer. Nothing but the standard library is imported before it is needed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache, partial
from types import MappingProxyType

from transplant_ray.evaluate import math_answers
from transplant_ray.evaluate.boxed import last_boxed, normalise


@dataclass(frozen=True)
class Grade:
    correct: bool
    parsed: str | None
    """What was read out of the completion; None where nothing could be, which counts as wrong."""
    error: str | None = None
    """Why the answer could not be judged, which counts as wrong: a time limit, a crash."""


Scorer = Callable[[str, str], Grade]

FORCED = "forced"
"""Right if and only if greedy decoding would emit exactly the reference's tokens; decided without decoding (`read`)."""

LOSS = "loss"
"""What the reference costs, in nats a token: a number, not right or wrong. Nothing is decoded (`read`)."""

CHOICES: Mapping[str, Callable[[str, int], int]] = MappingProxyType(
    {
        "choice": lambda _text, _num_tokens: 1,
        "choice:tokens": lambda _text, num_tokens: num_tokens,
        "choice:characters": lambda text, _num_tokens: len(text.strip()),
    }
)
"""Scorers that read choices: what the log-likelihood of one is divided by, of its text and its number of tokens."""

REGEX = "regex:"
"""Begins the name of a scorer that is a pattern; the recipe's `{regex: PATTERN}`."""

MATCH_LIMIT = 5.0
"""Seconds for one text and a pattern."""

TAIL = 20_000
"""Characters at the end of a completion in which `math` looks for an answer that is not boxed."""

_NUMBER = (
    r"(?=[-$.0-9])"  # most of a completion is words: eight times as fast
    r"(?P<sign>(?<![\w.)\]])-)?(?:\$(?P<inner>-)?)?"  # `5-3` has no negative number
    r"(?P<size>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(r"####[\s*]*" + _NUMBER)  # of `#### Step 1` no number is read
_SPELLINGS = (("{,}", ","), (r"\$", "$"), ("\u2212", "-"))


def exact(completion: str, answer: str) -> Grade:
    """Equal as strings, white space at both ends aside."""
    return _same(completion.strip() or None, answer.strip())


def strict_boxed(completion: str, answer: str) -> Grade:
    r"""The last `\boxed{}`, equal as a string once both are spelled alike (`normalise`). Kim et al. 2026, section 4."""
    boxed, reference = last_boxed(completion), last_boxed(answer)
    if not boxed or not boxed.strip():
        return Grade(False, None)
    return Grade(normalise(boxed) == normalise(answer if reference is None else reference), boxed)


def math(completion: str, answer: str) -> Grade:
    r"""Equal as mathematics: the last `\boxed{}`, or where there is none, what math-verify finds at the end."""
    boxed, reference = last_boxed(completion), last_boxed(answer) or answer
    if boxed is None:
        return Grade(*math_answers.compare(completion[-TAIL:], reference))
    if not boxed.strip():
        return Grade(False, None)
    if boxed.strip() == reference.strip():  # needs no algebra
        return Grade(True, boxed)
    found = math_answers.compare(f"\\boxed{{{boxed}}}", reference)
    return Grade(found.correct, boxed, found.error)


def number(completion: str, answer: str) -> Grade:
    """Equal as numbers: the first after `####`, or else the last of the text. 18.00 is 18, and `$`, `%` and commas do not count."""
    said, reference = _number(completion), _number(answer)
    return Grade(said is not None and reference is not None and Decimal(said) == Decimal(reference), said)


def regex(pattern: str, completion: str, answer: str) -> Grade:
    """Equal as strings: the pattern's group where it matches last. An answer that it does not match is the reference itself.

    A pattern that takes longer than MATCH_LIMIT on a text, which backtracking can, is an error of the grade.
    """
    try:
        return _same(_last_group(pattern, completion), _last_group(pattern, answer) or answer.strip())
    except TimeoutError:
        return Grade(False, None, f"no match within {MATCH_LIMIT:g} s")


SCORERS: Mapping[str, Scorer] = MappingProxyType({"exact": exact, "strict_boxed": strict_boxed, "math": math, "number": number})


@lru_cache
def find_scorer(name: str) -> Scorer:
    """The scorer behind a name of SCORERS, or behind `regex:PATTERN`; the recipe has checked that there is one."""
    if name.startswith(REGEX):
        return partial(regex, name.removeprefix(REGEX))
    return SCORERS[name]


def check_scorer(name: str) -> None:
    """RecipeError where a library that the scorer needs cannot be used here: before anything is loaded, not at the first answer."""
    if SCORERS.get(name) is math:
        math_answers.check()


def _same(said: str | None, reference: str) -> Grade:
    return Grade(said == reference, said)


def _last_group(pattern: str, text: str) -> str | None:
    """TimeoutError after MATCH_LIMIT."""
    found = _matched(pattern, text, MATCH_LIMIT)
    if found is None:
        raise TimeoutError
    return found[-1] if found else None


@lru_cache(maxsize=4096)  # variants often say the same, and what takes long should do so once
def _matched(pattern: str, text: str, limit: float) -> tuple[str, ...] | None:
    """What the group is in the last match, in one element or none; None where the limit was reached."""
    from regex import compile as compile_pattern  # type: ignore[import-untyped]  # unlike `re`, it can be given a time limit

    try:
        groups = [match[1].strip() for match in compile_pattern(pattern).finditer(text, timeout=limit) if match[1] is not None]
    except TimeoutError:
        return None
    return tuple(groups[-1:])


def _number(text: str) -> str | None:
    """Digits, with a minus and a point where they have one."""
    for spelled, plain in _SPELLINGS:
        text = text.replace(spelled, plain)
    marked = _MARKED_NUMBER.search(text)
    last = deque([marked] if marked else _ANY_NUMBER.finditer(text), maxlen=1)
    return next((_digits(match) for match in last), None)


def _digits(match: re.Match[str]) -> str:
    return ("-" if match["sign"] or match["inner"] else "") + match["size"].replace(",", "")
