"""Heads switched off by hand: what is shown is what the model cut by that plan does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deadhead import HeadPlan, InputError, cut, evaluate
from deadhead.checkpoints import checkpoint
from deadhead.data import load_text, load_tokenizer
from deadhead.measure.generate import generate_text
from deadhead.report.trial import Trial
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe
from tests.small_runs import save_small_llama, write_prose


def _is_what_the_cut_model_does(trial: Trial, name: str, kept: dict[str, list[int]], source: str) -> dict[str, Any]:
    found = trial.measure(name, kept, "the cat ")
    plan = HeadPlan.from_dict(found["plan"])
    folder = trial.models[name]
    model, tokenizer = cut(checkpoint.load(folder), plan), load_tokenizer(folder)
    text, _ = load_text(source, tokenizer=tokenizer)
    assert found["perplexity"] == pytest.approx(evaluate(model, text.splits["valid"], limit=200).perplexity, rel=1e-5)
    assert found["continuation"] == generate_text(model, tokenizer, "the cat ", max_new_tokens=120)
    assert (found["on"], found["total"]) == (sum(plan.heads), sum(plan.total.values()))
    return found


@pytest.mark.parametrize("name", ["gated", pytest.param("dense", marks=pytest.mark.slow)])
def test_clicked_heads_of_a_run(name: str, small_run: Path) -> None:
    recipe = load_recipe(small_run / "recipe.toml")
    trial = Trial(small_run, recipe.data, cache=small_run / "tokens", tokens=200)
    assert list(trial.models) == ["gated", "dense"]
    model = trial.describe(name)
    plan = HeadPlan.from_json(small_run / "head_plan.json")
    assert [layer["planned"] for layer in model["layers"]] == [list(heads) for heads in plan.kept.values()]
    assert [layer["present"] for layer in model["layers"]] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    source = recipe.data.source
    some = _is_what_the_cut_model_does(trial, name, {"0": [1, 3], "1": []}, source)
    whole = _is_what_the_cut_model_does(trial, name, {}, source)
    assert some["perplexity"] != whole["perplexity"] == some["whole"] == whole["whole"]
    planned = _is_what_the_cut_model_does(
        trial, name, {str(key): list(heads) for key, heads in plan.kept.items()}, source
    )
    if name == "gated":
        # The gates were trained with an output scale, so the plan that was learned is met to the letter.
        assert planned["plan"] == plan.to_dict()


def test_a_checkpoint_with_groups(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    save_small_llama(tmp_path / "llama", text)
    trial = Trial(tmp_path / "llama", DataRecipe(source=str(text)), tokens=200)
    model = trial.describe("model")
    assert (model["unit"], [layer["total"] for layer in model["layers"]]) == ("kv_group", [2, 2, 2])
    _is_what_the_cut_model_does(trial, "model", {"0": [1], "2": []}, str(text))


def test_what_was_cut_cannot_be_switched_on(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model, tokenizer = save_small_llama(tmp_path / "llama", text)
    cut(model, HeadPlan(kept={0: (1,)}, total={0: 2, 1: 2, 2: 2}, unit="kv_group"))
    checkpoint.save(model, tmp_path / "cut", tokenizer=tokenizer)
    trial = Trial(tmp_path / "cut", DataRecipe(source=str(text)), tokens=200)
    assert [layer["present"] for layer in trial.describe("model")["layers"]] == [[1], [0, 1], [0, 1]]
    assert trial.measure("model", {"0": [1]}, "the")["whole"] > 1
    with pytest.raises(InputError, match="cut before"):
        trial.measure("model", {"0": [0, 1]}, "the")


def test_bad_requests(small_run: Path) -> None:
    trial = Trial(small_run, load_recipe(small_run / "recipe.toml").data, tokens=50)
    for kept in ({"0": [4]}, {"7": []}, {"0": "01"}, {"0": [0, 0]}, {"blocks.0": [0]}, {"0": [True]}, {"../0": [0]}):
        with pytest.raises(InputError):
            trial.measure("gated", kept, "the")
    with pytest.raises(InputError, match="no model 'nothing'"):
        trial.describe("nothing")
    with pytest.raises(InputError, match="no model"):
        trial.measure("../gated", {}, "the")
    with pytest.raises(InputError, match="but got 2001"):
        trial.measure("gated", {}, "a" * 2001)
    with pytest.raises(InputError, match="empty"):
        trial.measure("gated", {}, "")
