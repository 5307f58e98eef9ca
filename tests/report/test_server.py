"""The live page's server: for those on this machine who know the token, and nobody else."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from deadhead import InputError
from deadhead.report.server import WatchedRun, make_app, serve
from deadhead.report.trial import Trial
from deadhead.training.recipes.reading import load_recipe

_TOKEN = "a-token-that-nobody-guesses"
_AUTHORISED = {"Authorization": f"Bearer {_TOKEN}"}


def _watched(folder: Path) -> WatchedRun:
    trial = Trial(folder, load_recipe(folder / "recipe.toml").data, cache=folder / "tokens", tokens=100)
    return WatchedRun(folder, trial, sentence="the cat", prompt="the ")


@pytest.fixture(scope="module")
def folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of our own to change."""
    folder = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(small_run, folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(make_app([_watched(folder)], token=_TOKEN), base_url="http://127.0.0.1:6007") as client:
        yield client


_PATHS = ["/", "/api/run?run=0", "/api/attention?run=0&sentence=a", "/api/trial?run=0", "/nothing"]


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer wrong", f"Bearer {_TOKEN}x", "Bearer ü", f"Basic {_TOKEN}"])
def test_nothing_without_the_token(client: TestClient, path: str, given: str) -> None:
    answer = client.get(path, headers={"Authorization": given.encode("latin-1")} if given else {})
    assert answer.status_code == 403
    assert "token" in answer.text and len(answer.text) < 200
    assert client.post("/api/trial", json={}).status_code == 403


def test_only_the_page_takes_the_token_from_its_address(client: TestClient) -> None:
    assert client.get(f"/?token={_TOKEN}").status_code == 200
    assert client.get("/?token=wrong").status_code == 403
    assert client.get(f"/api/run?run=0&token={_TOKEN}").status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:6007", "", "0.0.0.0"])
def test_other_names_of_this_machine_are_refused(client: TestClient, host: str) -> None:
    answer = client.get(f"/?token={_TOKEN}", headers={**_AUTHORISED, "Host": host})
    assert answer.status_code == 400
    assert answer.text == "Invalid host header"
    assert client.get("/", headers={**_AUTHORISED, "Host": "localhost:1234"}).status_code == 200


def test_answers_are_not_kept_and_not_framed(client: TestClient) -> None:
    for path in ("/", "/api/run?run=0", "/nothing"):
        headers = client.get(path, headers=_AUTHORISED).headers
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer", "the address holds the token"
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_news_only_where_there_are_some(client: TestClient, folder: Path) -> None:
    first = client.get("/api/run?run=0", headers=_AUTHORISED)
    mark = {"If-None-Match": first.headers["etag"]}
    again = client.get("/api/run?run=0", headers={**_AUTHORISED, **mark})
    assert (again.status_code, again.content) == (304, b"")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"phase": "finetune", "step": 9, "loss": 0.25}) + "\n")
    news = client.get("/api/run?run=0", headers={**_AUTHORISED, **mark})
    assert news.status_code == 200
    phases = {phase["name"]: phase for phase in news.json()["facts"]["phases"]}
    assert phases["finetune"]["done"] == 9
    assert set(news.json()["attention"]) == {"dense", "finetuned"}


def test_a_trial(client: TestClient) -> None:
    known = client.get("/api/run?run=0", headers=_AUTHORISED).json()
    assert (known["models"], known["prompt"]) == (["gated", "dense"], "the ")
    assert client.get("/api/trial?run=0", headers=_AUTHORISED).status_code == 400
    model = client.get("/api/trial?run=0&model=gated", headers=_AUTHORISED).json()
    assert [layer["total"] for layer in model["layers"]] == [4, 4]
    asked = {"run": 0, "model": "gated", "kept": {"0": [1]}, "prompt": "the cat"}
    found = client.post("/api/trial", json=asked, headers=_AUTHORISED).json()
    assert found["plan"]["kept"] == {"0": [1], "1": [0, 1, 2, 3]}
    assert found["continuation"].startswith("the cat")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b"7", 400),
        (b"{}", 400),
        (b'{"run": 0, "model": "gated", "kept": [], "prompt": "a"}', 400),
        (b'{"run": 0, "model": "gated", "kept": {}, "prompt": 7}', 400),
        (b'{"run": 0, "model": ["gated"], "kept": {}, "prompt": "a"}', 400),
        (b'{"run": 0, "model": "../dense", "kept": {}, "prompt": "a"}', 400),
        (b'{"run": 5, "model": "gated", "kept": {}, "prompt": "a"}', 400),
        (b'{"run": -1, "model": "gated", "kept": {}, "prompt": "a"}', 400),
        (b'{"run": 0, "model": "gated", "kept": {"0": [99]}, "prompt": "a"}', 400),
        (b'{"run": 0, "model": "gated", "kept": {"0": {"a": 1}}, "prompt": "a"}', 400),
        (b'{"run": 0, "model": "gated", "kept": {"0": null}, "prompt": "a"}', 400),
        (b'{"run": 0, "model": "gated", "kept": {}, "prompt": ""}', 400),
        (b'"' + b"a" * 2_000_000 + b'"', 413),
    ],
)
def test_bad_requests_get_a_sentence(client: TestClient, body: bytes, status: int) -> None:
    answer = client.post("/api/trial", content=body, headers=_AUTHORISED)
    assert answer.status_code == status
    assert re.search(r"[.?]$", answer.json()["error"])


@pytest.mark.parametrize("run", ["", "1", "-1", "x", "0x0", "٠", "9" * 50, "../0"])
def test_runs_that_are_not_there(client: TestClient, run: str) -> None:
    answer = client.get("/api/run", params={"run": run}, headers=_AUTHORISED)
    assert answer.status_code == 400
    assert "The page has 1 runs" in answer.json()["error"]


def test_a_taken_port_is_said(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot be used \(.*\); choose another with --port"):
            serve([_watched(folder)], port=taken.getsockname()[1], ready=lambda _: None)


def test_two_readers_at_once_see_the_same(folder: Path) -> None:
    run = _watched(folder)
    found: list[bytes] = []
    readers = [threading.Thread(target=lambda: found.append(run.read())) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 4
    assert len(set(found)) == 1
