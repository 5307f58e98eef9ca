"""Whole runs: what is in the folder, and that a run killed at any moment goes on to the same weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from deadhead import HeadPlan, InputError
from deadhead.measure.evaluation import evaluate
from deadhead.training import Run
from deadhead.training.recipes.reading import load_recipe, to_toml
from deadhead.training.recipes.recipe import Recipe
from tests.small_runs import (
    assert_same_tensors,
    child,
    metrics,
    small_recipe,
    tree,
    weights,
    without_times,
    write_prose,
)

_STAGES = ("dense", "gated", "cut", "finetuned")
_FOLDERS = ("dense", "gated", "pruned", "control")
_NUMBERS = {
    *("heads", "parameters", "flops_per_token", "perplexity", "word_perplexity", "bits_per_byte", "tokens_per_second"),
    "steps",
}
# Kills itself where the progress tells of a moment; a child of its own for each, so that torch is imported once.
_KILLED_AT = """
import os, signal, sys, time
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.runs.run import Run
failed = False
for moment in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{moment}"
    process = os.fork()
    if process == 0:
        def progress(name, done, total, logs):
            if f"{name} {done}" == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        Run.start(load_recipe(f"{sys.argv[1]}/recipe.toml"), folder, progress=progress).execute()
        os._exit(7)
    if moment == "from outside":
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{folder}/dense/config.json") and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
    failed |= os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != -signal.SIGKILL
sys.exit(failed)
"""
_MOMENTS = (
    "train 3",  # after a checkpoint at step 2
    "prune 3",  # with gates, after a checkpoint
    "evaluating gated 1",  # all steps done, the model not yet saved
    "finetune 1",  # `gated/` is there, the cut model is not
    "control_finetune 2",  # the second of the control's phases, after all of the first
    "from outside",  # as soon as the first model is there, whatever is being done then
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prose(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return small_recipe(text, prune={"sparsity": 0.5}, control=True)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    summary = Run.start(recipe, folder).execute()
    assert summary == Run.start(recipe, folder, resume=True).summary()
    return folder


@pytest.fixture(scope="module")
def killed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a run killed at each of the moments."""
    folder = tmp_path_factory.mktemp("killed")
    Run.start(recipe, folder / "recipe")
    shutil.copy(folder / "recipe" / "recipe.toml", folder)
    process = child(_KILLED_AT, str(folder), *_MOMENTS)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    yield folder


def test_the_folder_holds_what_the_design_says(whole: Path, recipe: Recipe) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("recipe.toml", "dense", "gated", "pruned", "control", "head_plan.json", "metrics.jsonl", "summary.json"),
        *("tensorboard", "tokenizer", "tokens"),
    }
    assert load_recipe(whole / "recipe.toml") == recipe
    summary = Run.start(recipe, whole, resume=True).summary()
    assert set(summary) == {*_STAGES, "budget", "control", "data", "processes", "versions", "samples"}
    plan = HeadPlan.from_json(whole / "head_plan.json")
    assert sum(plan.heads) == 4
    assert plan.output_scale
    for stage in (*_STAGES, "control"):
        assert set(summary[stage]) == _NUMBERS, stage
        dense_heads = stage in ("dense", "control")
        assert summary[stage]["heads"] == ([4, 4] if dense_heads else plan.heads)
        assert summary[stage]["perplexity"] > 1
        assert summary[stage]["tokens_per_second"] > 0
    assert [summary[stage]["steps"] for stage in (*_STAGES, "control")] == [3, 8, 8, 11, 11]
    # The cut changes nothing but the size.
    assert summary["cut"]["perplexity"] == pytest.approx(summary["gated"]["perplexity"], rel=1e-5)
    assert summary["cut"]["parameters"] == summary["finetuned"]["parameters"] < summary["dense"]["parameters"]
    assert summary["finetuned"]["perplexity"] != summary["cut"]["perplexity"]
    assert re.fullmatch("[0-9a-f]{64}", summary["data"]["sha256"])
    assert set(summary["samples"]) == {"dense", "pruned"}
    for phase in ("train", "prune", "finetune", "control_prune", "control_finetune"):
        steps = [line["step"] for line in metrics(whole) if line["phase"] == phase]
        assert steps == list(range(1, {"train": 3, "prune": 5}.get(phase.removeprefix("control_"), 3) + 1))
        assert list((whole / "tensorboard" / phase).glob("events*"))


def test_the_checkpoints_load_and_measure_as_the_summary_says(whole: Path, recipe: Recipe) -> None:
    summary = Run.start(recipe, whole, resume=True).summary()
    plan = HeadPlan.from_json(whole / "head_plan.json")
    text, _ = deadhead.data.load_text(recipe.data.source)
    for folder, stage in (("dense", "dense"), ("pruned", "finetuned"), ("control", "control")):
        model = deadhead.load(whole / folder)
        measured = evaluate(model, text.splits["valid"], limit=recipe.evaluation_tokens)
        assert measured.perplexity == pytest.approx(summary[stage]["perplexity"], rel=1e-6)
        cost = deadhead.model_cost(model)
        assert (cost.heads, cost.parameters) == (summary[stage]["heads"], summary[stage]["parameters"])
    _, gates = deadhead.load_gated(whole / "gated")
    assert gates.plan() == plan
    assert HeadPlan.from_json(whole / "pruned" / "head_plan.json") == plan


def test_phases_go_on_in_the_text(whole: Path, recipe: Recipe, text: Path) -> None:
    """The control reads the same text as the pruned model: its first loss with gates off is that of the dense model."""
    first = {line["phase"]: line for line in metrics(whole) if line["step"] == 1}
    model = deadhead.load(whole / "dense")
    stream, _ = deadhead.data.load_text(str(text))
    tokens = torch.from_numpy(stream.splits["train"].tokens.astype("int64"))
    per_row = (len(tokens) - 1) // (2 * 8)
    starts = [(row * per_row + 3) * 8 for row in range(2)]  # three steps of one segment a row were read
    ids = torch.stack([tokens[start : start + 9] for start in starts])
    with torch.no_grad():
        loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False).loss
    # The logged one has dropout 0.1.
    assert first["control_prune"]["loss"] == pytest.approx(float(loss), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", _MOMENTS)
def test_killed_and_resumed_is_as_if_never_stopped(moment: str, killed: Path, whole: Path, recipe: Recipe) -> None:
    folder = killed / moment
    if moment == "finetune 1":
        assert (folder / "gated" / "config.json").exists()
    assert (folder / "pruned").exists() == (moment == "control_finetune 2")
    summary = Run.start(recipe, folder, resume=True).execute()
    for name in _FOLDERS:
        assert_same_tensors(weights(folder / name), weights(whole / name))
    assert (folder / "head_plan.json").read_text() == (whole / "head_plan.json").read_text()
    assert metrics(folder) == metrics(whole)
    assert without_times(summary) == without_times(Run.start(recipe, whole, resume=True).summary())
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_resuming_a_finished_run_changes_no_model(whole: Path, recipe: Recipe) -> None:
    def models() -> dict[str, Any]:
        return {name: tree(whole / name) for name in _FOLDERS}

    before, lines = models(), metrics(whole)
    Run.start(recipe, whole, resume=True).execute()
    assert models() == before
    assert metrics(whole) == lines


@pytest.mark.slow
def test_begun_from_a_dense_model_goes_on_as_if_it_had_trained_it(whole: Path, recipe: Recipe, tmp_path: Path) -> None:
    """In the text too: heads, weights and what was measured are those of the run that trained the dense model."""
    later = recipe.model_copy(update={"dense": str(whole / "dense")})
    summary = Run.start(later, tmp_path / "run").execute()
    for name in _FOLDERS:
        assert_same_tensors(weights(tmp_path / "run" / name), weights(whole / name))
    assert without_times(summary) == without_times(Run.start(recipe, whole, resume=True).summary())
    assert metrics(tmp_path / "run") == [line for line in metrics(whole) if line["phase"] != "train"]
    # What is there already is not looked for again.
    gone = later.model_copy(update={"dense": str(tmp_path / "gone")})
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(gone))
    assert without_times(Run.start(gone, tmp_path / "run", resume=True).execute()) == without_times(summary)


def test_another_recipe_is_not_resumed(whole: Path, recipe: Recipe) -> None:
    other = recipe.model_copy(update={"seed": 1})
    before = tree(whole)
    with pytest.raises(
        InputError,
        match=r"holds a run of another recipe; resume it with: deadhead run .*recipe\.toml --out .* --resume",
    ):
        Run.start(other, whole, resume=True)
    assert tree(whole) == before


def test_a_run_is_not_begun_over_another(whole: Path, recipe: Recipe) -> None:
    with pytest.raises(InputError, match="holds a run already; continue it with resume"):
        Run.start(recipe, whole)


def test_a_foreign_folder_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    before = tree(tmp_path)
    for resume in (False, True):
        with pytest.raises(InputError, match="exists and was not written by deadhead"):
            Run.start(recipe, tmp_path, resume=resume)
    assert tree(tmp_path) == before


def test_a_text_that_cannot_be_used_leaves_nothing(tmp_path: Path) -> None:
    """So that the same command works once the text is mended."""
    (tmp_path / "short.txt").write_text("too short")
    recipe = small_recipe(tmp_path / "short.txt")
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="tokens were expected for 2 rows of segments of 8"):
            Run.start(recipe, tmp_path / "run").execute()
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_learned_ratio_runs_to_the_end(text: Path, tmp_path: Path) -> None:
    """λ mode, every gate closing: layers without a head are cut, tuned and saved like others."""
    summary = Run.start(small_recipe(text, prune={"l0": 3.0, "save_every": 0}), tmp_path / "run").execute()
    assert summary["finetuned"]["heads"] == [0, 0]
    assert "control" not in summary
    assert deadhead.model_cost(deadhead.load(tmp_path / "run" / "pruned")).heads == [0, 0]


@pytest.mark.slow
def test_a_run_may_rank_heads_instead_of_learning_gates(text: Path, tmp_path: Path) -> None:
    recipe = small_recipe(text, prune={"criterion": "taylor", "sparsity": 0.5, "steps": 2}, control=True)
    summary = Run.start(recipe, tmp_path / "run").execute()
    plan = HeadPlan.from_json(tmp_path / "run" / "head_plan.json")
    assert sum(plan.heads) == 4 and summary["cut"]["heads"] == plan.heads
    assert not plan.output_scale
    # Ranking is no training: the steps are those of the other phases, for the control too.
    assert [summary[stage]["steps"] for stage in (*_STAGES, "control")] == [3, 3, 3, 6, 6]
    phases = {line["phase"] for line in metrics(tmp_path / "run")}
    assert phases == {"train", "finetune", "control_finetune"}
    # What was ranked is the dense model: its weights are those of the gated one.
    gated = {name: value for name, value in weights(tmp_path / "run" / "gated").items() if "log_alpha" not in name}
    dense = weights(tmp_path / "run" / "dense")
    assert_same_tensors({name: gated[name] for name in dense}, dense)
    assert summary["gated"]["perplexity"] == pytest.approx(summary["cut"]["perplexity"], rel=1e-5)
