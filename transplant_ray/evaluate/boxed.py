r"""Boxed answers: the last `\boxed{}` of a text, and the spelling of LaTeX under which the MATH literature compares answers."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
"""What opens a box, an escaped character (`\\{` opens nothing), a brace."""


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` whose braces balance, `\fbox{}` too; None without one. Time is linear in the text."""
    last, found = -1, None
    opened: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            box = opened.pop() if opened else None
            if box is not None and box[0] > last:
                last, found = box[0], text[box[1] : token.start()]
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(None if token[0] == "{" else token.span())
    return found


_SPELLINGS = tuple(
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\n|\\!", ""),
        (r"\\\\", r"\\"),
        (r"\\[td]frac", r"\\frac"),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\^\\circ|\^\{\\circ\}", ""),
        (r"\\\$", ""),
        (r"^((?:(?!\\text\{ ).)*)\\text\{ (?:(?!\\text\{ ).)*$", r"\1"),  # a unit on the right, where there is one
        (r"\\?%", ""),
        (r"(^|[ {])\.", r"\g<1>0."),
        (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # `k = 3`
        (r"\\sqrt([^{\s\\\[])", r"\\sqrt{\1}"),
        (r" ", ""),
        (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
        (r"\\frac([^{\\])\{", r"\\frac{\1}{"),
        (r"^0\.5$", r"\\frac{1}{2}"),
        (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"),
    )
)


def normalise(latex: str) -> str:
    """One spelling for what the MATH literature calls the same answer: `is_equiv` of Hendrycks et al. 2021 compares these."""
    spelled = latex.strip()
    for pattern, replacement in _SPELLINGS:
        spelled = pattern.sub(replacement, spelled).strip()
    return spelled
