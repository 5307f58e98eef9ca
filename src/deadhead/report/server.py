"""The live page: the page of a run, served on this machine only, with updates of the run and a model to try."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, DispatchFunction, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deadhead.disk.files import finite
from deadhead.errors import InputError
from deadhead.report.page import page_policy, render_page
from deadhead.report.run_facts import ATTENTION_OF, RunFacts, checkpoints_in, sibling_points
from deadhead.report.trial import Trial

# Of a request; a plan of the largest model's heads and a prompt are far below.
_MOST_BYTES = 1 << 20


class WatchedRun:
    """A run that the page shows: its facts, which are read again when they change, and its models.

    `sentence` is the first sentence whose attention is shown; `prompt` is the first text that the models continue.
    """

    def __init__(self, folder: Path, trial: Trial, *, sentence: str, prompt: str) -> None:
        self.facts = RunFacts(folder)
        self.trial = trial
        self.sentence = sentence
        self.prompt = prompt
        self._lock = threading.Lock()
        self._models: dict[str, Path] = {}
        self._attention: dict[str, Any] | None = None
        self._text = b""

    def read(self) -> bytes:
        """Return the data of the page as JSON."""
        with self._lock:
            if self.facts.update() or not self._text:
                models = checkpoints_in(self.facts.folder, ATTENTION_OF)
                if models != self._models:
                    self._models, self._attention = models, None
                    # A model that does not tell its attention has a page all the same.
                    with suppress(InputError):
                        self._attention = self.trial.attention(self.sentence)
                page = {
                    "facts": self.facts.facts,
                    "others": sibling_points(self.facts),
                    "attention": self._attention,
                    "sentence": self.sentence,
                    "models": list(self.trial.models),
                    "prompt": self.prompt,
                }
                self._text = json.dumps(finite(page), allow_nan=False).encode()
            return self._text


def _guard(token: str) -> DispatchFunction:
    """Accept only requests with the token, and set the security headers of the answers."""

    async def guarded(request: Request, answer: RequestResponseEndpoint) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.scope["path"] == "/":
            given = given or request.query_params.get("token", "")
        if not secrets.compare_digest(given.encode(), token.encode()):
            return PlainTextResponse(
                "This page needs the token; open the address that deadhead watch printed.", status_code=403
            )
        response = await answer(request)
        response.headers.update(
            {
                "content-security-policy": f"{page_policy(live=True)}; frame-ancestors 'none'",
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cache-control": "no-store",
                "cross-origin-resource-policy": "same-origin",
            }
        )
        return response

    return guarded


def make_app(runs: Sequence[WatchedRun], *, token: str) -> Starlette:
    """Return the application that serves a page with several runs side by side.

    Every request must carry the token: the request for the page in its address, requests from the page in a header.
    """

    def page(request: Request) -> Response:
        return HTMLResponse(render_page([json.loads(run.read()) for run in runs], live=True))

    def news(request: Request) -> Response:
        text = asked_run(request).read()
        mark = f'"{hashlib.sha256(text).hexdigest()[:24]}"'
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304)
        return Response(text, media_type="application/json", headers={"ETag": mark})

    def attention(request: Request) -> Response:
        return JSONResponse(asked_run(request).trial.attention(request.query_params.get("sentence", "")))

    def trial(request: Request) -> Response:
        return JSONResponse(asked_run(request).trial.describe(request.query_params.get("model", "")))

    async def try_it(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                return JSONResponse({"error": f"The request is over {_MOST_BYTES} bytes long."}, status_code=413)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return JSONResponse({"error": "The request is not JSON."}, status_code=400)
        return await run_in_threadpool(measure, asked)

    def measure(asked: Any) -> Response:
        if not isinstance(asked, dict) or not isinstance(kept := asked.get("kept"), dict):
            raise InputError('The request must be a JSON object with "run", "model", "kept" and "prompt".')
        name, prompt = asked.get("model"), asked.get("prompt")
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise InputError('"model" and "prompt" of the request must be strings.')
        return JSONResponse(finite(_numbered(runs, str(asked.get("run"))).trial.measure(name, kept, prompt)))

    def asked_run(request: Request) -> WatchedRun:
        return _numbered(runs, request.query_params.get("run", ""))

    def bad_input(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=400)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/run", news),
            Route("/api/attention", attention),
            Route("/api/trial", trial, methods=["GET"]),
            Route("/api/trial", try_it, methods=["POST"]),
        ],
        # A name that some page's owner lets point here is refused before anything else is looked at.
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
            Middleware(BaseHTTPMiddleware, dispatch=_guard(token)),
        ],
        exception_handlers={InputError: bad_input},
    )


def _numbered(runs: Sequence[WatchedRun], number: str) -> WatchedRun:
    if not number.isascii() or not number.isdigit() or len(number) > 6 or int(number) >= len(runs):
        raise InputError(f"The page has {len(runs)} runs, numbered from 0, but got run {number!r}.")
    return runs[int(number)]


def serve(runs: Sequence[WatchedRun], *, port: int | None, ready: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until interrupted; without a port, on 6007 or any free one.

    `ready` is called with the page's address, including the token, once it can be opened.

    Raises:
        InputError: the port is in use or not allowed.
    """
    token = secrets.token_urlsafe(24)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with listening:
        try:
            listening.bind(("127.0.0.1", 6007 if port is None else port))
        except OSError as error:
            if port is not None:
                raise InputError(
                    f"Port {port} cannot be used ({error.strerror}); choose another with --port, or leave it out."
                ) from None
            listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        config = uvicorn.Config(make_app(runs, token=token), log_level="warning", access_log=False)
        ready(address)
        uvicorn.Server(config).run(sockets=[listening])
