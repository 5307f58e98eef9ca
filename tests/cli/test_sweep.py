"""`deadhead sweep`: its table, its JSON, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from deadhead.cli import execute
from tests.cli.conftest import Command

_SMALL = ("--of", "blocks", "--fast", "--steps", 2, "--batch-size", 2, "--sequence-length", 24, "--compensate-rows", 8)


def test_a_table_and_the_point_that_is_picked(
    given: Path, tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("sweep", "--model", given / "llama", "--data", given / "prose.txt", *_SMALL, "--params", "0.7,0.9")
    assert execute([*map(str, asked), "--out", str(tmp_path / "out"), "--max-loss", "100000%"]) == 0
    output, told = capfd.readouterr()
    assert "rank units by reconstruction" in told and "on 8 rows, 2 times" in told
    lines = {line.split()[0]: line.split()[-1] for line in output.splitlines() if line.strip()}
    assert lines["params-0.7"] == "picked" and lines["params-0.9"] != "picked" and "dense" in lines
    assert "…" not in output
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "<script" not in page and page.count("<svg") == 3 and page.count('class="picked"') == 4
    found = command.json(*asked, "--out", tmp_path / "out", "--resume", "--max-loss", "0")
    assert [point["asked"] for point in found["points"]] == [0.9, 0.7] and found["max_loss"] == 0
    for point in found["points"]:
        measured = command.json("eval", tmp_path / "out" / point["path"], "--data", given / "prose.txt")
        assert measured["perplexity"] == pytest.approx(point["perplexity"])


@pytest.mark.slow
def test_replies_stand_in_the_table_and_on_the_page(
    given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("sweep", "--model", given / "llama", "--data", given / "prose.txt", *_SMALL, "--params", "0.8")
    assert execute([*map(str, asked), "--replies", "--out", str(tmp_path / "out")]) == 0
    output = capfd.readouterr().out
    rows = {line.split()[0]: line.split() for line in output[output.index("repetition") :].splitlines() if line.strip()}
    assert rows["dense"][1:3] == ["–", "–"] and rows["params-0.8"][2].endswith("%") and "…" not in output
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count('<section class="reply">') == 3 and page.count("<dt>params-0.8</dt>") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "One budget with several values was expected (--params"),
        (("--params", "0.9", "--flops", "0.8"), "but --params and --flops were given"),
        (("--params", "0.9;0.8"), "takes numbers with commas between them"),
        (("--kv-cache", "0.9", "--max-loss", "much"), "--max-loss takes a share, as in 5%"),
        (("--params", "0.9", "--fast", "--criterion", "taylor"), "--fast stands for --criterion"),
        (("--sparsity", "0.5", "--criterion", "topk"), "topk trains for one"),
    ],
)
def test_bad_input_is_one_sentence(
    given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    base = ["sweep", "--model", str(given / "llama"), "--data", str(given / "prose.txt"), "--out", str(tmp_path / "o")]
    assert execute([*base, *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
