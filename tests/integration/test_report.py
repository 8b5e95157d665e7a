"""The report in a real browser: nothing in its console, nothing asked of the network, nothing of a run executed."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import Made, Row, write_run

from transplant_ray.report.build import build_report

CHROMIUM = shutil.which("chromium")
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


def look_at(page: Path, profile: Path) -> Seen:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--v=0", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return Seen(finished.stdout, [line for line in finished.stderr.splitlines() if "CONSOLE" in line])


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
    """Two hundred variants, hostile wherever a run has words of its own."""
    texts = hostile(server.address)

    def spoil(row: Row) -> Row:
        return {**row, "ranker": f"lae{texts[3]}" if row["ranker"] == "lae" else row["ranker"]}

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
    """Figures and tables scroll in boxes of their own. A window of the browser is at least 500 wide, so the page is in a frame."""
    policy = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
    measure = "<script>parent.postMessage(`${innerWidth} ${document.documentElement.scrollWidth}`, '*')</script></body>"
    (tmp_path / "inner.html").write_text(policy.sub("", page.read_text()).replace("</body>", measure))
    listen = "<title>nothing</title><script>addEventListener('message', event => document.title = event.data)</script>"
    (tmp_path / "outer.html").write_text(f"{listen}<iframe src=inner.html width={width} height=700 style='border:0'></iframe>")
    seen = look_at(tmp_path / "outer.html", tmp_path / "profile")
    (title,) = re.findall(r"<title>(.*?)</title>", seen.dom)
    inner, scrolled = map(int, title.split())
    assert inner == width
    assert scrolled <= inner
