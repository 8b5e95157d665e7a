"""Inputs that mean harm: whole ones, spoilt by a seeded hand. The same seed spoils the same input in the same way."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from transplant_ray.errors import TransplantError

LONG = 20_000

VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**15, 10**200, 1e308, -0.0, 0.5, 1e-320,
    "", " ", "0", "-1", "null", "NaN", "\n", "\x00", "\x85", "\u2028", "é", "\U0001f600", "\ud800", "\udfff x", "{", "{0}",
    "{a.b}", "{a!r:>{b}}", "..", "../..", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/", "~", "~nobody-of-this-name/x",
    "C:\\x", "file:///etc/passwd", "zoo:", "zoo:../..", "zoo:cross-generation/source", "a/b", "a/b/c", "$(id)", "[red]", "x" * LONG,
    "(a+)+$", [], {}, [[]], [None], {"": None}, {"a": {"a": {"a": 1}}}, [1, "a", None, [2]], ["x"] * 99, [0] * 300, {"regex": "(a"},
    {"choice": None},
)  # fmt: skip
"""What stands where something else was expected."""
JSON_TEXTS = (
    "NaN", "-Infinity", "1e999", "-0", "9" * 5000, "-" + "9" * 400, "1" + "0" * 400 + ".5", "[" * 300 + "]" * 300, "[" * LONG,
    '{"a":' * 300 + "1" + "}" * 300, "1_000", "0x10", "tru", '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x41"',
    '{"a": 1, "a": 2}', "",
)  # fmt: skip
"""What `json.dumps` never writes."""
YAML_TEXTS = (
    *(text for text in JSON_TEXTS if text != "[" * LONG), "[" * 100, "!!python/object/apply:os.system [id]",
    "!!python/name:os.system", "!!binary x", "!!int x", "!!float []", "!!timestamp x", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!bool x", "!!null x", "!!str [a]", "!!map [a]", "!!seq {a: b}", "!x y", "2024-13-45", "2024-02-30 25:00",
    "2024-02-03", "90:20:30", "0o17", "0b2", "1:60", "&a [*a]", "&a {a: *a}", "*nothing", "{<<: 1}", "{<<: [1]}", "{<<: &m {a: 1}}",
    "{? [a]: b}", "{? {a: b}: c}", "{1: 2}", "{null: 1}", "{true: 1}", "{[a, b]: 1}", "[a, b", "{a: b", "'", '"', "|", ">", "@",
    "`", "%", "- -", "? ", ": ", "\t",
    "[&b [1, 1, 1, 1, 1, 1, 1, 1, 1], &c [*b, *b, *b, *b, *b, *b, *b, *b, *b], &d [*c, *c, *c, *c, *c, *c, *c, *c, *c], "
    "&e [*d, *d, *d, *d, *d, *d, *d, *d, *d], &f [*e, *e, *e, *e, *e, *e, *e, *e, *e], &g [*f, *f, *f, *f, *f, *f, *f, *f, *f], "
    "&h [*g, *g, *g, *g, *g, *g, *g, *g, *g], &i [*h, *h, *h, *h, *h, *h, *h, *h, *h], [*i, *i, *i, *i, *i, *i, *i, *i, *i]]",
)  # fmt: skip
"""Tags that build objects, values that do not fit their tag, anchors that hold themselves or a billion of each other."""
NAMES = ("", " ", "a.b", "__class__", "__metadata__", "\ud800", "x" * LONG, "name", "model", "../x", "0", "é")


def ends_well(work: Callable[[], object]) -> bool:
    """Whether it worked; False where it ended in an error of ours. Anything else comes out, and fails the test."""
    said = None
    try:
        work()
    except TransplantError as error:
        said = str(error)
    assert said is None or said.strip()
    return said is None


class Hand:
    """Spoils values, texts and bytes."""

    def __init__(self, seed: object, values: Sequence[Any] = ()) -> None:
        """`values` are hostile where this input is read, beside those that are so everywhere."""
        self.random = random.Random(str(seed))
        self.values = (*VALUES, *values)

    def value(self) -> Any:
        return copy.deepcopy(self.random.choice(self.values))

    def bytes(self, content: bytes) -> bytes:
        """One to four bytes or stretches changed, taken out, doubled, put in; or the end cut off."""
        spoilt = bytearray(content)
        for _ in range(self.random.randint(1, 4)):
            start = self.random.randint(0, len(spoilt))
            end = min(len(spoilt), start + self.random.choice((1, 1, 2, 8, 64)))
            junk = bytes(
                self.random.choices(
                    (0, 1, 10, 34, 44, 91, 123, 125, 127, 128, 255, self.random.randrange(256)), k=max(1, end - start)
                )
            )
            piece = bytes(spoilt[start:end])
            spoilt[start:end] = self.random.choice(
                (junk, b"", piece * 2, junk + piece, bytes(byte ^ (1 << self.random.randrange(8)) for byte in piece))
            )
            if self.random.random() < 0.1:
                del spoilt[self.random.randint(0, len(spoilt)) :]
        return bytes(spoilt)

    def tree(self, value: Any) -> Any:
        """One to three places of a JSON value changed: another value, another place's value, another name, nothing."""
        spoilt = copy.deepcopy(value)
        for _ in range(self.random.choice((1, 1, 2, 3))):
            places = list(_places(spoilt))
            if not places:
                return self.value()
            holder, key = self.random.choice(places)
            other_holder, other_key = self.random.choice(places)
            change = self.random.randrange(8)
            if change == 0:
                del holder[key]
            elif change == 1:
                holder[key] = copy.deepcopy(other_holder[other_key])
            elif change == 2 and isinstance(holder, dict):
                holder[self.random.choice((*NAMES, other_key))] = holder.pop(key)
            else:
                holder[key] = self.value()
        return spoilt

    def json(self, value: Any, texts: Sequence[str] = JSON_TEXTS) -> str:
        """A spoilt value as JSON, now and then with a text in it that is none."""
        spoilt = self.tree(value)
        if self.random.random() < 0.4 and (places := list(_places(spoilt))):
            holder, key = self.random.choice(places)
            holder[key] = "<here>"
            return _dump(spoilt).replace('"<here>"', self.random.choice(texts))
        return _dump(spoilt)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]
