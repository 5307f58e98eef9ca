"""`deadhead report` and `deadhead watch` on the command line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from deadhead.cli import execute


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small finished run, to write a report into."""
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("reported") / "run"))


def test_a_report_lies_in_the_run_or_where_it_is_wanted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["report", str(run)]) == 0
    megabytes = (run / "report.html").stat().st_size / 1e6
    assert f"{run / 'report.html'}: {megabytes:.1f} MB" in capsys.readouterr().out
    assert execute(["report", str(run), "--out", str(tmp_path / "new" / "a.html"), "--json", "--no-attention"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "page": str(tmp_path / "new" / "a.html"),
        "bytes": (tmp_path / "new" / "a.html").stat().st_size,
        "runs_beside": [],
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report", "{nowhere}"], "The folder of a run was expected at"),
        (["report", "{empty}"], "is not the folder of a run"),
        (["report", "{run}", "--out", "{empty}"], "is a folder; name a file"),
        (["report", "{run}", "--with", "{empty}"], "is not the folder of a run"),
        (["report", "{run}", "--sentence", ""], "A sentence of at least one token was expected"),
        (["watch", "{nowhere}"], "The folder of a run was expected at"),
        (["watch", "{run}", "{empty}"], "is not the folder of a run"),
        (["watch", "{run}", "--port", "{taken}"], "choose another with --port"),
        (["watch"], "Missing argument"),
        (["run", "{run}/recipe.toml", "--out", "{nowhere}", "--report-to", "nonsense"], "but got 'nonsense'"),
    ],
)
def test_bad_input(
    arguments: list[str], sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty", "run": run}
        given = [text.format(**places, taken=taken.getsockname()[1]) for text in arguments]
        assert execute(given) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1 and "Traceback" not in printed
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_plan_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "head_plan.json").write_text("{")
    assert execute(["report", str(tmp_path)]) == 2
    assert "head plan" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
