"""Commands that need no weights start without torch; the others say at once that they load it."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import deadhead
from deadhead.checkpoints import checkpoint
from deadhead.cli import console, execute
from deadhead.measure.cost import model_cost
from deadhead.report.writing import report_run
from deadhead.training.runs.run import Run
from tests.random_models import random_plan, tiny_model
from tests.small_runs import small_recipe, write_prose

_WITHOUT_TORCH = """
import sys
from deadhead.cli import execute
code = execute(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
assert code == 0 and not heavy, (code, heavy)
"""


def _without_torch(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small finished run with a budget, whose page was written."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = small_recipe(write_prose(folder.parent.parent), prune={"sparsity": 0.5})
    Run.start(recipe, folder).execute()
    report_run(folder)
    return folder


@pytest.mark.parametrize("name", ["dense", "gated", "pruned"])
def test_inspect_of_a_folder(run: Path, name: str) -> None:
    found = json.loads(_without_torch("inspect", run / name, "--json"))
    cost = model_cost(checkpoint.load(run / name))
    assert found == {**vars(cost), "gated": name == "gated"}
    shown = _without_torch("inspect", run / name)
    assert f"{cost.parameters:,}" in shown and ("·" in shown) == (name == "pruned")


def test_inspect_tells_the_same_with_torch_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    total = dict.fromkeys(range(3), 4)
    kept = {layer: tuple(range(4)) for layer in total}
    deadhead.cut(model, random_plan(random.Random(1), kept, total, output_scale=False))
    deadhead.save(model, tmp_path / "model")
    assert execute(["inspect", str(tmp_path / "model")]) == 0
    from_folder = capsys.readouterr().out
    # Of a configuration alone torch tells.
    assert execute(["inspect", str(tmp_path / "model" / "config.json")]) == 0
    assert capsys.readouterr().out == from_folder


@pytest.mark.parametrize("options", [[], ["--no-attention"]])
def test_report_of_a_run(run: Path, options: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    _without_torch("report", run, "--out", page, *options)
    assert ('"columns":[' in page.read_text("utf-8")) == (not options)


def test_attention_is_read_again_where_model_or_sentence_is_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def patterns(folder: Path, sentence: str, progress: Any) -> dict[str, Any]:
        read.append(sentence)
        return {}

    monkeypatch.setattr("deadhead.report.attention.run_attention", patterns)
    page = tmp_path / "page.html"
    report_run(run, page)
    assert read == []
    for sentence in ("a cat", "a cat", "a dog"):
        report_run(run, page, sentence=sentence)
    assert read == ["a cat", "a dog"]
    checkpoint.save(tiny_model(seed=1), run / "dense")
    report_run(run, page, sentence="a dog")
    (run / "attention.json").write_text("[]")
    report_run(run, page, sentence="a dog")
    assert read == ["a cat", "a dog", "a dog", "a dog"]


def test_loading_is_said_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, quiet, rank, speaks in (
        (True, False, "0", True),
        (True, True, "0", False),
        (True, False, "1", False),
        (False, False, "0", False),
    ):
        told = io.StringIO()
        monkeypatch.setattr(console, "errors", Console(file=told, force_terminal=is_terminal))
        monkeypatch.setenv("RANK", rank)
        console.load_torch(quiet)
        assert ("loading torch and transformers" in told.getvalue()) == speaks


def test_a_wrong_plan_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    code = _WITHOUT_TORCH.replace("code == 0", "code == 2")
    arguments = ["cut", "model", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=120)
