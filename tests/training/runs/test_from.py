"""Runs that begin from a model of transformers: where it stays, how they go on, and what recipes may not say."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from deadhead import HeadPlan, InputError
from deadhead.report.writing import report_run
from deadhead.training import Recipe, Run
from deadhead.training.recipes.reading import changed, load_recipe, parse_recipe, to_toml
from tests.small_runs import assert_same_tensors, save_small_llama, tree, weights, without_times, write_prose

_PHASE = {"steps": 3, "batch_size": 2, "sequence_length": 24, "save_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and a Llama."""
    folder = tmp_path_factory.mktemp("from")
    save_small_llama(folder / "llama", write_prose(folder))
    return folder


def recipe_of(place: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "llama",
        "control": True,
        "evaluation_tokens": 100,
        "model": {"from": str(place / "llama")},
        "data": {"source": str(place / "prose.txt")},
        "prune": {**_PHASE, "params": 0.8, "distill": 0.5},
        "finetune": _PHASE,
    }
    return Recipe.model_validate({**values, **sections})


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run of all phases, which tests only read, and its summary."""
    before = tree(place)
    folder = tmp_path_factory.mktemp("whole") / "run"
    summary = Run.start(recipe_of(place), folder).execute()
    # The model stays where it is, untouched.
    assert tree(place) == before
    return folder, summary


def test_all_phases_run_and_are_shown(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = whole
    assert [summary[stage]["steps"] for stage in ("dense", "gated", "cut", "finetuned", "control")] == [0, 3, 3, 6, 6]
    assert summary["dense"]["heads"] == [2, 2, 2]
    assert summary["cut"]["perplexity"] == pytest.approx(summary["gated"]["perplexity"], rel=1e-4)
    assert summary["budget"]["reached"] <= 0.8
    # What follows is fitted to the model it began from, before it is trained on.
    assert summary["compensation"]["after"] < summary["compensation"]["before"]
    assert not (folder / "dense").exists()
    assert "[train]" not in (folder / "recipe.toml").read_text()
    plan = HeadPlan.from_json(folder / "head_plan.json")
    assert deadhead.model_cost(deadhead.load(folder / "pruned")).heads == plan.heads
    shown = shutil.copytree(folder, tmp_path / "shown")
    assert report_run(shown).path.exists()


@pytest.mark.slow
def test_stopped_while_it_fine_tunes_it_goes_on_to_the_same_weights(
    place: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def stop(name: str, done: int, *_: Any) -> None:
        if (name, done) == ("finetune", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run.start(recipe_of(place), tmp_path / "stopped", progress=stop).execute()
    written = load_recipe(tmp_path / "stopped" / "recipe.toml")
    summary = Run.start(written, tmp_path / "stopped", resume=True).execute()
    assert without_times(summary["finetuned"]) == without_times(whole[1]["finetuned"])
    for name in ("pruned", "control"):
        assert_same_tensors(weights(tmp_path / "stopped" / name), weights(whole[0] / name))


def test_another_model_by_now_is_refused(place: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path / "llama", place / "prose.txt")
    recipe = recipe_of(place, model={"from": str(tmp_path / "llama")})

    def stop(name: str, *_: Any) -> None:
        if name == "prune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run.start(recipe, tmp_path / "run", progress=stop).execute()
    model = deadhead.load(tmp_path / "llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="has other weights than when this run started"):
        Run.start(recipe, tmp_path / "run", resume=True).execute()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('tokenizer = "byte"', "leave .data. tokenizer out"),
        ("vocab_size = 300", "leave .data. vocab_size out"),
        ('tokenizer = "bpe"\nvocab_size = 300', "leave .data. tokenizer and vocab_size out"),
    ],
)
def test_a_run_whose_recipe_says_too_much_goes_on_without_it(
    lines: str, message: str, place: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(place)
    Run.start(recipe, tmp_path / "run")
    written = tmp_path / "run" / "recipe.toml"
    begun = written.read_text()
    written.write_text(begun.replace("[data]", f"[data]\n{lines}"))
    with pytest.raises(InputError, match=rf"{written} .* {message}"):
        Run.start(recipe, tmp_path / "run", resume=True)
    written.write_text(begun)
    Run.start(recipe, tmp_path / "run", resume=True)


def test_trained_on_first_where_the_recipe_says_so(place: Path, tmp_path: Path) -> None:
    summary = Run.start(recipe_of(place, train=_PHASE, control=False), tmp_path / "run").execute()
    assert [summary[stage]["steps"] for stage in ("dense", "gated", "finetuned")] == [3, 6, 9]
    assert "model" not in summary
    assert (tmp_path / "run" / "dense" / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[model]\nfrom = "x"\nlayers = 2\n[data]\nsource = "t"', "has its sizes, so leave layers out"),
        ('[model]\nfrom = "x"', r"learned from other text, so name one in \[data\] source"),
        ('dense = "y"\n[model]\nfrom = "x"\n[data]\nsource = "t"', "leave one of the two out"),
        ('[model]\nfrm = "x"', "did you mean 'from'"),
    ],
)
def test_recipes_that_do_not_go_together(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_recipe(text, name="r")


def test_the_installed_recipe_and_its_toml() -> None:
    text = (importlib.resources.files("deadhead.recipes") / "llama.toml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, name="llama")
    assert (recipe.trains_dense, recipe.dense_phase) == (False, None)
    again = parse_recipe(to_toml(recipe), name="again")
    assert to_toml(again) == to_toml(recipe)
    assert changed(recipe, seed=3).dense_phase is None
