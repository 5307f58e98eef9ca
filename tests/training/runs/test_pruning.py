"""A phase of pruning from beginning to end: which criterion it takes, and how a cut model recovers, killed or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead import InputError
from deadhead.compensation.record import card_line
from deadhead.training import PhaseRecipe, PruneRecipe
from deadhead.training.phases.defaults import recovery, with_criterion
from deadhead.training.phases.phase import train
from deadhead.training.runs import pruning
from tests.small_runs import assert_same_tensors, weights

_SMALL: dict[str, Any] = {"steps": 3, "batch_size": 2, "sequence_length": 24, "params": 0.7, "of": "blocks"}


@pytest.mark.parametrize(
    ("settings", "recovers", "expected"),
    [
        ({"params": 0.8}, False, "sizes"),
        ({"kv_cache": 0.5, "steps": 3, "batch_size": 2}, False, "sizes"),
        ({"sparsity": 0.5}, False, "gates"),
        ({}, False, "gates"),
        ({"params": 0.8, "freeze_weights": True}, False, "gates"),
        ({"params": 0.8, "start_from": "taylor"}, True, "gates"),
        ({"params": 0.8, "distill": 0.5}, False, "gates"),
        ({"params": 0.8, "distill": 0.5}, True, "sizes"),
        ({"params": 0.8, "criterion": "taylor"}, True, "taylor"),
    ],
)
def test_what_is_asked_for_decides_on_the_criterion(settings: dict[str, Any], recovers: bool, expected: str) -> None:
    recipe = PruneRecipe(**settings)
    found = with_criterion(recipe, tiny_model("llama"), recovers=recovers)
    assert found.criterion == expected
    assert found.is_ranked == (expected not in ("gates", "topk"))
    # Sizes have steps and rows of their own, unless they are stated.
    if expected == "sizes" and "steps" not in settings:
        assert (found.steps, found.batch_size) == (80, 4)
    if "steps" in settings:
        assert (found.steps, found.batch_size) == (settings["steps"], settings["batch_size"])


@pytest.mark.parametrize("model", ["ours", "bert"])
def test_sizes_are_for_pretrained_language_models(model: str, place: Path) -> None:
    network = deadhead.load(place / "ours") if model == "ours" else tiny_model("bert").base_model
    assert with_criterion(PruneRecipe(params=0.8), network).criterion == "gates"


def test_a_recovery_takes_what_the_phase_says_of_training() -> None:
    model = tiny_model("llama")
    plain = recovery(PruneRecipe(criterion="sizes", params=0.8), 50, model)
    whole = {"schedule": "cosine", "warmup_steps": 5, "distill": 1.0, "distill_temperature": 1.0}
    assert plain == PhaseRecipe(steps=50, batch_size=4, learning_rate=2e-4, **whole)
    asked = PruneRecipe(params=0.8, steps=7, batch_size=3, learning_rate=0.1, distill=0.5, lora_rank=2, warmup_steps=0)
    found = recovery(asked, 50, model)
    assert (found.steps, found.batch_size, found.learning_rate) == (50, 3, 0.1)
    assert (found.distill, found.lora_rank, found.warmup_steps, found.schedule) == (0.5, 2, 0, "cosine")


def test_a_cut_model_learns_from_the_dense_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers: list[Any] = []

    def noting(model: Any, text: Any, recipe: Any, run: Any) -> Any:
        teachers.append(run.teacher)
        return train(model, text, recipe, run)

    monkeypatch.setattr(pruning, "train", noting)
    text, dense = str(place / "prose.txt"), deadhead.load(place / "llama")
    common = {**_SMALL, "recover": 30, "learning_rate": 3e-3}
    found = deadhead.prune(place / "llama", text, out=tmp_path / "out", **common)
    assert found.measured is not None and found.unrecovered is not None
    assert found.measured.after.perplexity < found.unrecovered.perplexity
    assert (found.steps, found.gates) == (30, None)
    # It is the model as it was, and did not learn along.
    assert_same_tensors(teachers[0].state_dict(), dense.state_dict())
    # As without a recovery, up to there.
    alone = deadhead.prune(place / "llama", text, **_SMALL)
    assert alone.plan == found.plan and alone.compensation is not None and found.compensation is not None
    assert alone.compensation.to_dict() == found.compensation.to_dict()
    assert alone.measured is not None
    assert alone.measured.after.perplexity == pytest.approx(found.unrecovered.perplexity, rel=1e-6)
    assert card_line(found.model.config.compensation) in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert found.to_dict()["unrecovered_perplexity"] == found.unrecovered.perplexity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_gates_that_learned_with_the_weights_recover_too(place: Path) -> None:
    model = deadhead.load(place / "ours")
    found = deadhead.prune(
        model, str(place / "prose.txt"), sparsity=0.5, steps=3, batch_size=2, recover=2, compensate=True
    )
    assert found.model is model and found.steps == 5 and sum(found.plan.heads) == 4
    assert found.unrecovered is not None and found.compensation is not None


@pytest.mark.parametrize("moment", ["before the first step", "between two steps"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_recovery_that_is_stopped_goes_on_to_the_same_weights(
    moment: str, in_memory: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(place / "prose.txt")
    common = {**_SMALL, "recover": 6, "save_every": 2, "seed": 3, "lora_rank": 0}

    def prune(name: str, **options: Any) -> Any:
        model = deadhead.load(place / "llama") if in_memory else place / "llama"
        return deadhead.prune(model, text, out=tmp_path / name, **common, **options)

    said: list[Any] = []
    whole = prune("whole", announce=said.extend)
    assert len(said) == 3 and said[-1].what.startswith("recover in 6 steps")
    said.clear()

    def stopping(model: Any, text: Any, recipe: Any, run: Any) -> Any:
        if moment != "before the first step":
            train(model, text, recipe, run)
            for path in (tmp_path / "stopped.work" / "recovery").glob("checkpoint-6"):
                shutil.rmtree(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            prune("stopped")
    assert (tmp_path / "stopped.work" / "cut").is_dir() and not (tmp_path / "stopped").exists()
    with monkeypatch.context() as patch:
        # What was chosen is not chosen again.
        patch.setattr(pruning, "choose_units", lambda *_: pytest.fail("units were chosen again"))
        resumed = prune("stopped", resume=True, announce=said.extend)
    assert [part.what.split(" in ")[0] for part in said] == ["recover"]
    assert resumed.plan == whole.plan and resumed.budget == whole.budget
    assert resumed.compensation is not None and resumed.compensation == whole.compensation
    assert_same_tensors(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    for name in ("config.json", "head_plan.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recover": -1}, "recover must be a whole number of at least 0"),
        ({"recover": 1, "cut": False}, "recover is for a model that is cut"),
        ({"recover": 1, "resume": True, "out": "no"}, "There is nothing to resume"),
    ],
)
def test_what_cannot_recover(settings: dict[str, Any], message: str, place: Path, tmp_path: Path) -> None:
    if "out" in settings:
        settings = {**settings, "out": tmp_path / settings["out"]}
    with pytest.raises(InputError, match=message):
        deadhead.prune(place / "llama", str(place / "prose.txt"), **{**_SMALL, **settings})
    assert not any(tmp_path.iterdir())


def test_recovering_needs_a_text_and_a_cut(place: Path) -> None:
    with pytest.raises(InputError, match="recover learns from a text"):
        deadhead.prune(place / "llama", criterion="magnitude", sparsity=0.5, recover=2)
    with pytest.raises(InputError, match="recover is for a model that is cut"):
        deadhead.finetune(place / "llama", str(place / "prose.txt"), steps=1, batch_size=2, recover=2)
    assert torch.is_grad_enabled()
