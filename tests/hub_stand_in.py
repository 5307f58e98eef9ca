"""A server that stands for the Hugging Face hub while a model is uploaded: it keeps the files of each commit."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@contextmanager
def hub_stand_in() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Serve on this machine; yield the address and the files that were committed, by name, as they come in."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, value: Any, code: int = 200, **headers: str) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            # There is nothing yet: no card, no index of files.
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/api/repos/create":
                self._answer({"url": f"http://{self.headers['Host']}/someone/small", "id": "someone/small"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                kept = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                self._answer({"files": kept})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._answer({"commitUrl": f"http://{self.headers['Host']}/someone/small/commit/1", "commitOid": "1"})
            else:
                self._answer({"error": f"{self.path} was not expected"}, 500)

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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", files
        finally:
            server.shutdown()
