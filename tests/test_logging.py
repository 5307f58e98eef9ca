"""What the library says of what it does: one logger, silent until a program asks."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import deadhead
from tests.small_runs import save_small_llama, write_prose


def _prune(folder: Path, text: Path) -> None:
    settings = {"params": 0.8, "steps": 2, "batch_size": 2, "sequence_length": 24, "compensate_rows": 4}
    deadhead.prune(folder / "llama", str(text), criterion="flap", out=folder / "small", recover=2, **settings)


def test_nothing_is_printed_unasked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = write_prose(tmp_path)
    save_small_llama(tmp_path / "llama", text)
    capfd.readouterr()
    _prune(tmp_path, text)
    assert capfd.readouterr() == ("", "")


def test_the_logger_tells_each_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = write_prose(tmp_path)
    save_small_llama(tmp_path / "llama", text)
    with caplog.at_level(logging.DEBUG, logger="deadhead"):
        _prune(tmp_path, text)
    ours = [record for record in caplog.records if record.name.split(".")[0] == "deadhead"]
    info = "\n".join(record.getMessage() for record in ours if record.levelno == logging.INFO)
    recovery = ("phase recover: training for 2 steps", "phase recover: done")
    told = ("loaded", "prune begins", "scoring", "cut ", "held-out loss", *recovery, "prune is done")
    places = [info.index(each) for each in told]
    assert places == sorted(places)
    # Gates do not count.
    (whole,) = re.findall(r"prune begins: LlamaForCausalLM of (\d+) parameters", info)
    (left,) = re.findall(rf"checked: (\d+) of {whole} parameters are left", info)
    assert f"prune is done: {left} parameters" in info
    assert any(record.levelno == logging.DEBUG and ".down_proj: " in record.getMessage() for record in ours)
    assert max(record.levelno for record in ours) == logging.INFO
