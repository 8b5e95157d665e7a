"""A figure as inline SVG: text stays text, and nothing in it has a name that another figure of the page has."""

from __future__ import annotations

import io
import re
import warnings
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from transplant_ray.report.look import STYLE

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
LEAST, MOST = 0.85, 1.3
"""Times the size at which it was drawn."""
_REFERENCE = re.compile(r"#([\w-]+)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}(?![\w-])")
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 does not allow, not even escaped."""
_FAMILY = re.compile(r"font-family:[^;]*;?|font-variant:[^;]*;?")


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure for an HTML page. `name` is unique on the page; `title` is what a screen reader says.

    It has a view box and no size, so that the page decides how wide it is; fonts are those of the page. Equal figures give equal
    bytes.
    """
    written = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the page's fonts draw it
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(_legal(written.getvalue()))
    referred = _references(root)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{SVG}metadata", f"{SVG}style")]:
            parent.remove(child)
    for element in root.iter():
        _clean(element, name, referred)
    root.attrib = {
        "xmlns": SVG.strip("{}"), "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": _legal(title),
        "stroke-linejoin": "round", "stroke-linecap": "butt", "style": _widths(root.attrib["viewBox"]),
    }  # fmt: skip
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _widths(view_box: str) -> str:
    """How far a figure may shrink and grow before its text is too small or too large to read; less room scrolls it in its box."""
    width = float(view_box.split()[2])
    return f"min-width: {LEAST * width:.0f}px; max-width: {MOST * width:.0f}px"


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)


def _references(root: ElementTree.Element) -> frozenset[str]:
    """Ids that something in the figure refers to; matplotlib names everything else too."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    return frozenset(name for value in values if "#" in value for name in _REFERENCE.findall(value))


def _clean(element: ElementTree.Element, name: str, referred: frozenset[str]) -> None:
    element.tag = element.tag.removeprefix(SVG)
    element.text = (element.text or "").strip() if element.tag != "text" else element.text
    element.tail = None
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id" and value not in referred:
            continue
        element.attrib["href" if key == HREF else key] = _attribute(key, value, name)


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if value.startswith("data:"):  # pixels
        return value
    if key == "style":
        value = _FAMILY.sub("", value).strip()
    if "url(#" in value or value.startswith("#"):
        return value.replace("#", f"#{name}-") if key in ("clip-path", HREF) else value
    return _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), " ".join(value.split()))
