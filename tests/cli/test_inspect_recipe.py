"""`deadhead inspect` of a recipe, and with numbers of heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deadhead
from deadhead.cli import execute
from deadhead.training.recipes.reading import to_toml
from tests.conftest import ROOT
from tests.small_runs import small_recipe

_PAPER = str(ROOT / "src" / "deadhead" / "recipes" / "paper.toml")


@pytest.fixture
def show(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> str:
        code = execute(["inspect", *(str(argument) for argument in arguments)])
        output, errors = capfd.readouterr()
        assert (code, errors) == (0, "")
        return output

    return run


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> str:
        code = execute(["inspect", *(str(argument) for argument in arguments)])
        output, errors = capfd.readouterr()
        assert (code, output, errors.count("\n")) == (2, "", 1)
        return errors

    return run


def test_the_papers_recipe(show: Any) -> None:
    """The table fits into 80 characters, and the numbers are those of --json."""
    text = show(_PAPER)
    lines = text.splitlines()
    assert max(map(len, lines[:6])) <= 80
    assert lines[0].split() == ["heads", "a", "layer", "gone", "parameters", "of", "heads", "FLOPs", "stated"]
    assert lines[1].split() == ["dense", "16", "×", "8", "0%", "54.67M", "54.54M", "110.15M", "53.80M"]
    assert lines[2].split() == ["43", "%", "gone", "43%", "≈31.21M", "≈31.09M", "≈62.79M", "30.70M"]
    assert lines[5].split()[4:] == ["5254344444443333", "54%", "25.27M", "25.14M", "50.77M"]
    assert "without the output layer" in text and "≈ the authors state no numbers of heads" in text
    result = json.loads(show(_PAPER, "--json"))
    assert (result["recipe"], result["vocab_size"], result["length"]) == ("paper", None, 192)
    assert [model["interpolated"] for model in result["models"]] == [False, True, False, False, False]
    assert result["models"][0]["parameters"] == 54_666_752
    assert result["models"][4]["heads"] == [5, 2, 5, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3]


def test_with_its_vocabulary(show: Any) -> None:
    text = show(_PAPER, "--vocab-size", 267735)
    assert max(map(len, text.splitlines()[:6])) <= 80
    assert "147.94M" in text and "with an output layer of 267,735 tokens" in text
    result = json.loads(show(_PAPER, "--vocab-size", 267735, "--length", 10, "--json"))
    assert (result["vocab_size"], result["length"]) == (267735, 10)
    dense = result["models"][0]
    assert dense["flops_per_token"] > dense["layer_flops_per_token"]


def test_a_recipe_of_ones_own(tmp_path: Path, show: Any) -> None:
    (tmp_path / "mine.toml").write_text(to_toml(small_recipe(tmp_path / "text")))
    text = show(tmp_path / "mine.toml", "--heads", "4,1", "--heads", "0,3")
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["dense", "--heads", "--heads"]
    assert "an output layer of 257 tokens" in text and "≈" not in text
    models = json.loads(show(tmp_path / "mine.toml", "--heads", "4,1", "--json"))["models"]
    assert [model["heads"] for model in models] == [[4, 4], [4, 1]]


def test_heads_of_a_checkpoint(given: Path, show: Any) -> None:
    model = deadhead.load(given / "model")
    assert "as it is" not in show(given / "model")
    text = show(given / "model", "--heads", "2,0")
    assert text.startswith("layer 0  ■ ■ ■ ■  4/4\n")
    assert [line.split()[:3] for line in text.splitlines()[-2:]] == [["as", "it", "is"], ["--heads", "20", "75%"]]
    plan = deadhead.HeadPlan(kept={0: [0, 1], 1: []}, total={0: 4, 1: 4})
    (layout,) = json.loads(show(given / "model", "--heads", "2,0", "--json"))["layouts"]
    assert layout["parameters"] == deadhead.model_cost(model, plan).parameters
    assert "layouts" not in json.loads(show(given / "model", "--json"))
    # Of grouped queries, key/value heads.
    (layout,) = json.loads(show(given / "llama", "--heads", "2,1,0", "--json"))["layouts"]
    assert (layout["heads"], layout["total_heads"]) == ([2, 1, 0], [2, 2, 2])


def test_what_is_refused(given: Path, tmp_path: Path, refused: Any) -> None:
    assert "A recipe was expected at none.toml" in refused("none.toml")
    assert "takes whole numbers with commas between, one a layer, but got '4;4'" in refused(_PAPER, "--heads", "4;4")
    assert "must be 16 numbers" in refused(_PAPER, "--heads", "4,4")
    assert "must be 2 numbers" in refused(given / "model", "--heads", "4,4,4")
    assert "at most [4, 4], but are [5, 4]" in refused(given / "model", "--heads", "5,4")
    assert "--vocab-size is for recipes" in refused(given / "model", "--vocab-size", 9)
    (tmp_path / "r.toml").write_text('[[published]]\nname = "a"\nhedas = [1]\n')
    assert "unknown key 'published.0.hedas'; did you mean 'heads'?" in refused(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[model]\nheads = 3\n")
    assert "The recipe's model does not fit together" in refused(tmp_path / "r.toml")
