"""Names of the hub without a network: a no within seconds, and what its cache has is still loaded."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

import deadhead
from deadhead.cli import execute
from deadhead.data import load_text, load_tokenizer
from deadhead.disk import hub
from deadhead.errors import InputError

# What it imports when it is first asked for takes seconds of its own.
_prune = deadhead.prune


@pytest.fixture(autouse=True)
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the hub be a place that takes connections and never answers, and its cache an empty folder."""
    for name in [name for name in os.environ if hub._PATIENT.fullmatch(name)]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        yield


@pytest.mark.parametrize(
    "door",
    [
        lambda: deadhead.load("no/such-model"),
        lambda: load_tokenizer("gtp2"),
        lambda: load_text("hf:no/such"),
        lambda: _prune("no/such-model", "a.txt"),
    ],
)
def test_a_no_within_three_seconds(door: Callable[[], object]) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match="it does not answer, and its cache on this machine has none") as caught:
        door()
    assert time.monotonic() - begin < 3
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "command",
    [
        "inspect no/such",
        "prune --model no/such --data a.txt --out o",
        "finetune --model no/such --out o",
        "train --out o --data hf:no/such",
        "eval gtp2",
        "export no/such --to padded --out o",
        "cut no/such --plan p.json --out o",
    ],
)
def test_a_no_on_the_command_line_and_no_noise(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text('{"version": 1, "unit": "head", "total": {"0": 2}, "kept": {"0": [0]}}')
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    assert execute(command.split()) == 2
    output, errors = capfd.readouterr()
    assert (output, errors.count("\n")) == ("", 1) and "does not answer" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json"]


def test_what_the_cache_has_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    place = tmp_path / "cache" / "models--me--tiny"
    model.save_pretrained(tmp_path / "tiny")
    shutil.copytree(tmp_path / "tiny", place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    # The function's default was bound when it was defined.
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    begin = time.monotonic()
    assert type(deadhead.load("me/tiny")) is LlamaForCausalLM
    assert time.monotonic() - begin < 3
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="A tokenizer was expected at me/tiny"):
        load_tokenizer("me/tiny")


def test_who_asked_for_patience_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    assert not hub.answers()
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "60")
    assert hub.answers()
    with hub.quick("a/b"):
        assert not constants.HF_HUB_OFFLINE


def test_one_that_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Session:
        def head(self, place: str, timeout: float) -> None:
            asked.append(place)

    monkeypatch.setattr(hub, "get_session", Session)
    assert hub.answers() and hub.answers() and len(asked) == 1


def test_threads_leave_the_setting_as_it_was() -> None:
    first, second = hub.quick("a/b"), hub.quick("c")
    first.__enter__()
    second.__enter__()
    assert constants.HF_HUB_OFFLINE
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE


_LOCAL: dict[str, Callable[[Path], object]] = {
    "model": lambda folder: deadhead.load(folder / "m"),
    "tokenizer": lambda folder: load_tokenizer(folder / "m"),
    "text": lambda folder: load_text(folder / "a.txt"),
    "rows": lambda folder: load_text(folder / "a.jsonl"),
    "data set": lambda folder: load_text(f"hf:{folder / 'd'}"),
    "save": lambda folder: deadhead.save(deadhead.load(folder / "m"), folder / "o", base=folder / "m"),
    "prune": lambda folder: _prune(folder / "m", folder / "a.jsonl", **_SMALL),
    "inspect": lambda folder: execute(["inspect", str(folder / "m")]),
}
_SMALL: dict[str, Any] = {"steps": 1, "batch_size": 1, "sequence_length": 8, "sparsity": 0.5}


@pytest.mark.parametrize("door", _LOCAL)
def test_what_lies_on_this_disk_asks_nobody(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "m")
    (tmp_path / "d").mkdir()
    (tmp_path / "a.txt").write_text("words and words\n" * 50)
    for file in (tmp_path / "a.jsonl", tmp_path / "d" / "a.jsonl"):
        file.write_text('{"text": "words and words"}\n' * 50)
    load_text(tmp_path / "a.txt")[1].save_pretrained(str(tmp_path / "m"))
    asked: list[object] = []

    def ask(*what: object, **how: object) -> None:
        asked.append(what)
        raise OSError("no network")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (hub, "_ask")):
        monkeypatch.setattr(place, name, ask)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    _LOCAL[door](tmp_path)
    assert not asked
    assert not datasets.config.HF_HUB_OFFLINE
