"""As much of a model hub as the package needs, on this machine: one repository, its commits, and a log of what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

GATE_SECONDS = 200


@dataclass(frozen=True)
class Request:
    method: str
    file: str
    """File of the repository, or the path of the API."""
    num_bytes: int
    """Bytes of the body that was sent."""


@dataclass
class Hub:
    """`repository` is `owner/name`; `commits` maps a commit to its folder, `references` a branch or tag to its commit."""

    repository: str
    commits: Mapping[str, Path]
    references: Mapping[str, str]
    address: str = ""
    log: list[Request] = field(default_factory=list)
    gate: threading.Barrier | None = None
    """Where whoever marks waits for the others."""
    seconds: float = 0.0
    """That a whole file takes, at least."""

    def commit(self, revision: str) -> str | None:
        commit = self.references.get(revision, revision)
        return commit if commit in self.commits else None


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        """The hub keeps a log of its own."""

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        if parts.path == "/mark":
            if self.hub.gate is not None:
                self.hub.gate.wait(GATE_SECONDS)
            self._send(200, b"", {}, parts.query, body)
            return
        api, files = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self._info(path, path.removeprefix(api).removeprefix("/revision/") or "main", body)
        elif path.startswith(f"{api}/tree/") and path.count("/") == api.count("/") + 2:
            self._tree(path, path.rpartition("/")[2], body)
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self._file(revision, name, body)
        else:
            here = path.startswith((api, f"/{self.hub.repository}/"))
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if here else "RepoNotFound"}, path, body)

    def _info(self, path: str, revision: str, body: bool) -> None:
        commit = self.hub.commit(revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, path, body)
            return
        siblings = [{"rfilename": file.name} for file in sorted(self.hub.commits[commit].iterdir())]
        info = {"_id": "1", "id": self.hub.repository, "sha": commit, "tags": [], "downloads": 0, "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, path, body)

    def _tree(self, path: str, revision: str, body: bool) -> None:
        """The files of a commit; a folder within it is not there."""
        folder = self.hub.commits[self.hub.commit(revision) or ""]
        entries = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)} for file in folder.iterdir()]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, path, body)

    def _file(self, revision: str, name: str, body: bool) -> None:
        commit = self.hub.commit(revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, name, body)
            return
        path = self.hub.commits[commit] / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, name, body)
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        status, wanted = self._range(content)
        if status == 206:
            headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{len(content)}"
        self._send(status, content[wanted.start : wanted.stop], headers, name, body)

    def _range(self, content: bytes) -> tuple[int, range]:
        asked = self.headers.get("Range")
        if asked is None:
            return 200, range(len(content))
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return 206, range(int(first), min(int(last or len(content) - 1) + 1, len(content)))

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], file: str, body: bool) -> None:
        self.hub.log.append(Request(self.command, file, len(content) if body else 0))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and status == 200:
            time.sleep(self.hub.seconds)
        if body:
            self.wfile.write(content)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
