"""What a recipe may not begin from; each sentence says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deadhead
from deadhead import HeadPlan, InputError
from deadhead.training.runs.run import Run
from tests.small_runs import save_small_llama, save_small_model, small_recipe, tree, write_prose


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and models."""
    folder = tmp_path_factory.mktemp("inputs")
    text = write_prose(folder)
    save_small_model(folder / "wide", text, width=64)
    save_small_model(folder / "transformer_xl", text, architecture="transformer_xl", persistent=None)
    save_small_llama(folder / "llama", text)
    cut = deadhead.load(save_small_model(folder / "cut", text))
    deadhead.cut(cut, HeadPlan(kept={0: [0, 2]}, total={0: 4, 1: 4}))
    deadhead.save(cut, folder / "cut", tokenizer=deadhead.data.load_text(str(text))[1])
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no such folder; first run the recipe that trains it, or leave dense out"),
        ("empty", "model configuration was expected"),
        ("llama", "must be one of deadhead's own .* but its model type is 'llama'; name others in"),
        ("cut", "heads of that model are already cut"),
        ("wide", r"sets hidden_size to 32, but the dense model in .*wide has 64; copy the \[model\] of"),
        ("transformer_xl", "sets num_persistent to 8, but the dense model in .* has 0"),
    ],
)
def test_one_sentence_and_nothing_written(place: Path, name: str, message: str, tmp_path: Path) -> None:
    recipe = small_recipe(place / "prose.txt", dense=str(place / name))
    before: Any = tree(place)
    with pytest.raises(InputError, match=message):
        Run.start(recipe, tmp_path / "run").execute()
    assert not (tmp_path / "run").exists()
    assert tree(place) == before


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    """Return the folder of a finished run."""
    folder = place.parent / "a finished run"
    Run.start(small_recipe(place / "prose.txt"), folder).execute()
    return folder


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"train": {"steps": 2}}, r"\[train\]"), ({"data": {"source": "other"}}, "text"), ({}, "number of processes")],
)
def test_a_dense_model_trained_otherwise_is_refused(
    changes: dict[str, Any], what: str, place: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_text("another text. " * 600, encoding="utf-8")
    if "data" in changes:
        changes = {"data": {"source": str(tmp_path / "other")}}
    if not changes:
        monkeypatch.setattr("deadhead.training.runs.inputs.count", lambda: 3)
    recipe = small_recipe(place / "prose.txt", dense=str(first / "dense"), **changes)
    with pytest.raises(InputError, match=f"was trained with another {what} "):
        Run.start(recipe, tmp_path / "second").execute()
    assert not (tmp_path / "second").exists()
