"""Addresses as they may be shown: without what opens the door.

Passwords that are typed into an address unescaped are read as SQLAlchemy and pyarrow read them, up to the last `@`. Where it is not
clear what is part of a password, it is: a text that loses a word harms nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

HIDDEN = "***"
HARMLESS = {"region", "endpoint_override", "scheme", "allow_bucket_creation", "allow_bucket_deletion", "charset", "sslmode"}
"""Settings in the query of an address that are no secret. Of all others nobody knows: signatures and passwords have many names."""
SHORTEST = 4
"""Characters of a secret that is looked for in a text. A shorter one is in every other word."""

_ADDRESS = re.compile(r"//\S+")
_PASSWORD = re.compile(r"//[^/\s:@'\"]*:(?!\d{1,5}(?:[/?#\s'\"),;]|$))(?:(?!://)[^\n])*@")
"""A user's name and a password, which may hold `/` and spaces. What looks like a port is none, unless the next pattern says so."""
_IN_A_TOKEN = re.compile(r"//\S*@")
_IN_AN_ADDRESS = re.compile(r"//.*@", re.DOTALL)
_PLAIN = re.compile(r"[\w.:/-]*(?:%(?!40)[\w.:/-]*)*")
_AFTER = re.compile(r"['\")>\].,:;]*$")
"""What ends a quotation or a sentence, and belongs to no address."""


def redact_address(address: str) -> str:
    """One address, all of the text: no user, no password, and of its query only what is harmless."""
    return _hide_query(_IN_AN_ADDRESS.sub("//", address)) if "//" in address else address


def redact(text: str, known: str = "") -> str:
    """A text with the addresses in it redacted, and with what is secret in the address `known`, wherever the text says it."""
    for secret in sorted(set(_secrets(known)), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_A_TOKEN.sub("//", _PASSWORD.sub("//", text))
    return _ADDRESS.sub(lambda found: _hide_query(found[0]), text)


def _hide_query(address: str) -> str:
    after = _AFTER.search(address)
    end = after.start() if after else len(address)
    head, mark, query = re.match(r"([^?#]*)([?#]?)(.*)", address[:end], re.DOTALL).groups()  # type: ignore[union-attr]  # matches all
    return head + mark + "&".join(_hide(piece, mark) for piece in query.split("&")) + address[end:]


def _hide(piece: str, mark: str) -> str:
    name, equals, value = piece.partition("=")
    if not _is_secret(name, equals, value, mark):
        return piece
    return f"{name}={HIDDEN}" if equals else HIDDEN


def _is_secret(name: str, equals: str, value: str, mark: str) -> bool:
    if not equals:  # a bare word of a query may be a key; of a fragment it is a heading
        return bool(name) and mark == "?"
    return bool(value) and not (name in HARMLESS and _PLAIN.fullmatch(value))


def _secrets(address: str) -> Iterator[str]:
    """What an address holds that must not be said, as it is typed, unescaped, and in the pieces that a parser makes of it."""
    if "//" not in address:
        return
    if userinfo := re.search(r"//(.*)@", address, re.DOTALL):
        yield from _long(_forms(userinfo[1].partition(":")[2]))
    for piece in re.split(r"[?#]", address, maxsplit=1)[1:]:
        for name, equals, value in (part.partition("=") for part in piece.split("&")):
            if _is_secret(name, equals, value, "?"):
                yield from _long(_forms(value or name))


def _forms(secret: str) -> Iterable[str]:
    return {secret, unquote(secret), *re.split(r"[/\s?#@:]", secret)}


def _long(secrets: Iterable[str]) -> Iterator[str]:
    return (secret for secret in secrets if len(secret) >= SHORTEST)
