"""A page taken apart by a parser: its elements, its text, its ids and what refers to them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Page(HTMLParser):
    """`Page.of(html)`: what a reader of the page gets."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    """Tag, attribute, value."""
    pieces: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    @classmethod
    def of(cls, html: str) -> Page:
        page = cls()
        page.feed(html)
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        """White space as single spaces."""
        return flat("".join(self.pieces))

    @property
    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]

    @property
    def references(self) -> set[str]:
        """Names of elements that something on the page points to."""
        hrefs = {value.removeprefix("#") for _, name, value in self.attributes if name == "href" and value.startswith("#")}
        return hrefs.union(*(re.findall(r"url\(#([^)]+)\)", value) for _, _, value in self.attributes))


def flat(text: str) -> str:
    return " ".join(text.split())
