"""The report in a real browser: nothing in its console, nothing asked of the network, nothing of a run executed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from runs import Made, Row, write_run

from transplant_ray.report.build import build_report

CHROMIUM = shutil.which("chromium")
POLICY = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; .ci/run installs Debian's")


@dataclass
class Server:
    """Writes down what it is asked for."""

    address: str
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{listening.server_address[1]}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield found
    listening.shutdown()


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page."""

    dom: str
    console: list[str]


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--v=0", "--virtual-time-budget=5000", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


def look_at(page: Path, profile: Path) -> Seen:
    finished = browse(page, profile, "--dump-dom")
    return Seen(finished.stdout, [line for line in finished.stderr.splitlines() if "CONSOLE" in line])


def in_a_frame(html: str, width: int, folder: Path, script: str) -> Any:
    """What the script, a JavaScript expression, is on a page of this width. A window is at least 500 wide, so it is in a frame."""
    told = f"<script>parent.postMessage(JSON.stringify({script}), '*')</script></body>"
    (folder / "inner.html").write_text(POLICY.sub("", html).replace("</body>", told))
    listen = "<title>nothing</title><script>addEventListener('message', event => document.title = event.data)</script>"
    (folder / "outer.html").write_text(f"{listen}<iframe src=inner.html width={width} height=700 style='border:0'></iframe>")
    (title,) = re.findall(r"<title>(.*?)</title>", look_at(folder / "outer.html", folder / "profile").dom)
    return json.loads(unescape(title))


def hostile(address: str) -> tuple[str, ...]:
    """What would fetch, run or rewrite something if it were markup; every one would set the title or ask the server."""
    return (
        f"<img src='{address}/img' onerror=\"document.title='owned'\">",
        f"</bdi></td></tr></table><script src='{address}/script'></script><script>document.title='owned'</script>",
        f"</style><link rel=stylesheet href='{address}/css'><style>@import '{address}/import'",
        f"<svg><image href='{address}/svg'/><script>document.title='owned'</script></svg>",
        f"<iframe src='{address}/frame'></iframe><object data='{address}/object'></object>",
        f"<meta http-equiv=refresh content='0;url={address}/meta'><base href='{address}/'>",
        "</title><plaintext>", "<!-- not closed",
        "&#60;script&#62;document.title='owned'&#60;/script&#62;", "\x00<\x00script>", "‮nigiro",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """Two hundred variants of which everything is measured, hostile wherever a run has words of its own."""
    texts = hostile(server.address)

    def spoil(row: Row) -> Row:
        measured = {"channels": 0.05 if row["penalty"] else None, "loss": 1.2345, "num_parameters": 12_345_678 * row["num_modules"]}
        return {**row, **measured, "ranker": f"lae{texts[3]}" if row["ranker"] == "lae" else row["ranker"]}

    return build_report(write_run(tmp_path_factory.mktemp("report") / "run", Made(texts=texts, change=spoil, guards=texts[:2])))


def test_the_report_opens_without_an_error_and_asks_nobody_for_anything(page: Path, server: Server, tmp_path: Path) -> None:
    assert len(page.read_bytes()) < 5_000_000
    server.asked.clear()
    seen = look_at(page, tmp_path)
    assert seen.console == []
    assert server.asked == []
    assert re.findall(r"<title>(.*?)</title>", seen.dom) == ["made: Confirmed, with loss"]
    assert not re.search(r"<(script|iframe|object|base|link|img|plaintext)\b", seen.dom)
    assert seen.dom.count("<h2") == 8  # every section is there, the last one too
    for text in hostile(server.address)[:6]:
        assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in seen.dom


def test_such_errors_and_requests_would_be_seen(server: Server, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(f"<img src='{server.address}/seen'><script>console.error('a word'); nowhere.at.all</script>")
    server.asked.clear()
    seen = look_at(bad, tmp_path / "profile")
    assert "/seen" in server.asked
    assert any("a word" in line for line in seen.console)
    assert any("nowhere is not defined" in line for line in seen.console)


def test_a_script_that_came_in_all_the_same_would_be_refused(page: Path, server: Server, tmp_path: Path) -> None:
    """The page's own policy is a second wall behind the escaping."""
    broken = tmp_path / "broken.html"
    came_in = f"<script>document.title='owned'</script><img src='{server.address}/wall'>"
    broken.write_text(page.read_text().replace("</main>", f"{came_in}</main>"))
    server.asked.clear()
    seen = look_at(broken, tmp_path / "profile")
    assert "owned</title>" not in seen.dom
    assert server.asked == []
    assert any("Content Security Policy" in line for line in seen.console)


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_is_no_wider_than_the_screen(page: Path, tmp_path: Path, width: int) -> None:
    """Figures and tables scroll in boxes of their own."""
    inner, scrolled = in_a_frame(page.read_text(), width, tmp_path, "[innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    assert scrolled <= inner


# On paper: A4, upright but for the table of variants, which lies on its side.

MARGIN = 12
"""Millimetres on the left and on the right, as the style sheet says."""
PIXELS = 96 / 25.4
"""Of CSS, in a millimetre."""
POINTS = 72 / 25.4
SIDES = {"upright": (210, "#variants"), "sideways": (297, "main > :not(#variants)")}
"""Width of the sheet in millimetres, and what is printed on other sheets."""
LOOK = """(() => {
    const all = [...document.querySelectorAll("main, main *")].filter(element => element.getClientRects().length);
    const style = element => getComputedStyle(element);
    const name = element => `${element.tagName} ${element.getAttribute("class")}`;
    const wide = all.filter(element => element.getBoundingClientRect().right > innerWidth + 0.5);
    const cut = all.filter(element =>
        (style(element).overflowX != "visible" && element.scrollWidth > element.clientWidth) ||
        (style(element).overflowY != "visible" && element.scrollHeight > element.clientHeight));
    const shown = element => element.getBoundingClientRect().height > 0 && element.checkVisibility({contentVisibilityAuto: true});
    const folded = [...document.querySelectorAll("details > *, details li")].filter(element =>
        all.includes(element.closest("section")) && !shown(element));
    return {width: innerWidth, seen: all.length, wide: wide.map(name), cut: cut.map(name), folded: folded.map(name)};
})()"""


def on_paper(html: str) -> str:
    """What the style sheet says of print holds, and what it says of screens does not."""
    assert html.count("@media print") == 1
    return html.replace("@media print", "@media all").replace("@media screen", "@media not all")


@pytest.mark.parametrize("side", SIDES)
def test_on_paper_nothing_sticks_out_is_cut_off_or_stays_folded(page: Path, tmp_path: Path, side: str) -> None:
    width, elsewhere = SIDES[side]
    printable = int((width - 2 * MARGIN) * PIXELS)
    html = on_paper(page.read_text()).replace("</style>", f"{elsewhere} {{ display: none }}</style>")
    found = in_a_frame(html, printable, tmp_path, LOOK)
    assert (found.pop("width"), found.pop("seen") > 500) == (printable, True)
    assert found == {"wide": [], "cut": [], "folded": []}


def test_what_sticks_out_is_cut_off_or_stays_folded_on_paper_would_be_seen(page: Path, tmp_path: Path) -> None:
    worse = "table { min-width: 60rem } .flips .text { max-height: 1em; overflow: auto }"
    worse += "details::details-content { content-visibility: hidden; block-size: 0 }"
    html = on_paper(page.read_text()).replace("</style>", f"#variants {{ display: none }} @media all {{ {worse} }}</style>")
    found = in_a_frame(html, 703, tmp_path, LOOK)
    assert "TABLE flips" in found["wide"]
    assert "BDI text" in found["cut"]
    assert "PRE null" in found["folded"]


@dataclass(frozen=True)
class Printed:
    """A PDF, as far as its plain parts tell. Lengths are points."""

    content: bytes

    @property
    def pages(self) -> list[tuple[float, float]]:
        boxes = re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", self.content)
        return [(float(width), float(height)) for width, height in boxes]

    @property
    def scales(self) -> set[float]:
        """Points to a pixel of CSS: 0.75, unless the browser has made the page smaller to fit its widest part in."""
        turns = re.compile(rb"([0-9.]+) 0 0 -[0-9.]+ 0 [0-9.]+ cm\s+q\s+([0-9.]+) 0 0 [0-9.]+ [0-9.]+ [0-9.]+ cm")
        found = [turns.match(begin) for begin in self._streams()]
        return {round(float(match[1]) * float(match[2]), 3) for match in found if match}

    @property
    def links(self) -> dict[str, tuple[float, float]]:
        """Address → where it, or its last line, begins and ends."""
        found = re.findall(
            rb"/Rect \[([0-9.]+) [0-9.]+ ([0-9.]+) [0-9.]+\]\s+/A <</Type /Action\s+/S /URI\s+/URI \(([^)]+)\)", self.content
        )
        return {address.decode(): (float(left), float(right)) for left, right, address in found}

    def _streams(self) -> Iterator[bytes]:
        for place in re.finditer(rb"stream\r?\n", self.content):
            with suppress(zlib.error):
                yield zlib.decompressobj().decompress(self.content[place.end() :], 200).lstrip()


def linked(html: str, before: str, after: str, address: str) -> str:
    """What is last between the two becomes a link: a PDF says where it is."""
    end = html.rindex(after)
    start = html.rindex(before, 0, end) + len(before)
    return f"{html[:start]}<a href='{address}'>{html[start:end]}</a>{html[end:]}"


def test_printed_on_a4_it_keeps_its_size_and_its_ends(page: Path, tmp_path: Path) -> None:
    html = page.read_text().replace("@page { margin", "@page { size: A4; margin")
    html = linked(html, "<li>", "</li></ol>", "tel:1")  # in a part that is folded on a screen
    html = linked(html, '<td class="id">', "</td></tr>", "tel:2")  # in a table that scrolls there, in its last row and column
    html = linked(html, "<pre>\n", "</pre>", "tel:3")
    (tmp_path / "page.html").write_text(html)
    browse(tmp_path / "page.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    printed = Printed((tmp_path / "page.pdf").read_bytes())
    assert {(round(width / POINTS), round(height / POINTS)) for width, height in printed.pages} == {(210, 297), (297, 210)}
    assert printed.scales == {0.75}
    assert printed.links.keys() == {"tel:1", "tel:2", "tel:3"}
    for address, (left, right) in printed.links.items():
        assert MARGIN * POINTS - 1 <= left < right <= ((297 if address == "tel:2" else 210) - MARGIN) * POINTS + 1
