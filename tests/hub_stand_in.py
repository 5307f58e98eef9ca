"""A server that stands for the Hugging Face hub while a model is uploaded: it keeps the files of each commit."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class _Hub(ThreadingHTTPServer):
    """Knows no file when it starts; answers as the hub does where an upload asks it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}

    def post(self, path: str, body: bytes) -> tuple[dict[str, Any], int]:
        """Return what the hub answers, and the status."""
        if path == "/api/repos/create":
            return {"url": f"{self.address}/someone/small", "id": "someone/small"}, 200
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if "/preupload/" in path:
            # All files come within the commit.
            asked = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return {"files": [file | {"shouldIgnore": False} for file in asked]}, 200
        if "/commit/" in path:
            sent = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in sent}
            return {"commitUrl": f"{self.address}/someone/small/commit/1", "commitOid": "1"}, 200
        return {"error": f"{path} was not expected"}, 500


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_GET(self) -> None:
        # There is nothing yet: no card, no index of files.
        self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(*self.server.post(self.path, self._body()), {})

    def _answer(self, value: dict[str, Any], code: int, headers: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub_stand_in() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Serve on this machine; yield the address and the files that were committed, by name, as they come in."""
    with _Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub.address, hub.files
        finally:
            hub.shutdown()
