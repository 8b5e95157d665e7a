"""A hub on this machine: serves folders the way huggingface.co serves repositories, and counts what it sends."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import HfApi, constants

COMMIT = "c" * 40
"""The only commit of every repository here; its branch is `main`."""


@dataclass
class LocalHub:
    repositories: Mapping[str, Path]
    """Hub id → folder."""
    sent: dict[str, int] = field(default_factory=dict)
    """File name → bytes that went over the wire."""


@contextmanager
def local_hub(repositories: Mapping[str, Path], cache: Path) -> Iterator[LocalHub]:
    """Until the end of the block, huggingface_hub and transformers in this process talk to a server of our own."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = LocalHub(repositories)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        patch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=url), raising=False)  # made once, with the address of then
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield server.hub
        finally:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    hub: LocalHub


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = (parts[2:] if api else parts) + ["", ""]
        folder = cast(_Server, self.server).hub.repositories.get(f"{owner}/{name}")
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("", "main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api and rest[0] == "tree" and rest[2]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})  # no repository here has folders
        elif api:
            self._send(200, json.dumps(_tree(folder) if rest[0] == "tree" else _info(f"{owner}/{name}", folder)).encode(), {})
        else:
            self._send_file(folder / rest[-3])

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        size = path.stat().st_size
        first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes", "Content-Length": str(size)}
        if self.command == "HEAD":
            return self._send(200, b"", headers)
        with path.open("rb") as file:
            file.seek(int(first))
            content = file.read(min(int(last or size), size - 1) + 1 - int(first))
        sent = cast(_Server, self.server).hub.sent
        sent[path.name] = sent.get(path.name, 0) + len(content)
        headers |= {"Content-Length": str(len(content)), "Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{size}"}
        return self._send(206 if "Range" in self.headers else 200, content, headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _info(name: str, folder: Path) -> dict[str, Any]:
    return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in sorted(folder.iterdir())]}


def _tree(folder: Path) -> list[dict[str, Any]]:
    return [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)} for p in sorted(folder.iterdir())]


def _etag(path: Path) -> str:
    return hashlib.sha1(f"{path}{path.stat().st_size}".encode()).hexdigest()
