"""Inline SVG: text is text, nothing collides, equal figures give equal bytes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pages import Page

from transplant_ray.report.look import drawing
from transplant_ray.report.svg import inline_svg


def make(title: str = "title", *, raster: bool = False) -> Figure:
    with drawing():
        figure = Figure(figsize=(3, 2))
        axis = figure.subplots()
        axis.plot([1, 2], [1, 3], marker="o", rasterized=raster)
        axis.fill_between([1, 2], [0, 1], [2, 3])
        axis.set_title(title)
    return figure


@settings(max_examples=25, deadline=None)
@example("0\r4")
@example("$\\frac{1$ <b>&amp;</b> ]]>")
@example("\x00\x0b\uffff\U0001f600")
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_title_is_text_in_a_well_formed_figure(title: str) -> None:
    root = ElementTree.fromstring(inline_svg(make(title), "one", title))
    kept = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", title)
    lines = ["".join(element.itertext()).split() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(line.split() in lines for line in kept.split("\n") if line.split())
    known = {"svg", "g", "path", "text", "use", "defs", "clipPath", "rect", "tspan"}
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= known


def test_two_figures_on_a_page_share_no_name() -> None:
    pages = [Page.of(inline_svg(make(), name, "x")) for name in ("one", "two")]
    for page in pages:
        assert page.references
        assert page.references <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))
    assert not set(pages[0].ids) & set(pages[1].ids)


def test_equal_figures_give_equal_bytes_without_a_date() -> None:
    first = inline_svg(make(), "one", "x")
    assert inline_svg(make(), "one", "x") == first
    assert "metadata" not in first
    assert "<style" not in first


def test_a_label_is_escaped_and_the_size_is_left_to_the_page() -> None:
    page = Page.of(inline_svg(make(), "one", '"><script>x</script>'))
    attributes = {name: value for tag, name, value in page.attributes if tag == "svg"}
    assert attributes["aria-label"] == '"><script>x</script>'
    assert attributes["role"] == "img"
    assert not {"width", "height"} & set(attributes)
    assert attributes["viewbox"] == "0 0 216 144"


def test_numbers_are_short_and_pixels_are_whole() -> None:
    svg = inline_svg(make(raster=True), "one", "x")
    pixels = re.search(r'href="data:image/png;base64,([^"]*)"', svg)
    assert pixels is not None
    assert not re.search(r"\d\.\d{3,}", svg.replace(pixels[1], ""))


def test_fonts_are_those_of_the_page() -> None:
    assert "font-family" not in inline_svg(make(), "one", "x")
