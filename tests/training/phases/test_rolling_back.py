"""Losses, gradients and weights that are not finite: found at the step; back to the last checkpoint, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from deadhead.errors import DivergenceError, RunWarning
from deadhead.training import PhaseRun, train
from deadhead.training.phases.checkpoints import last_checkpoint
from deadhead.training.phases.rolling_back import rolled_back
from deadhead.training.runs.run import Run
from deadhead.training.runs.summary import read_summary
from tests.random_models import tiny_model
from tests.small_phase import TEXT, At, phase_recipe, poison, prune_recipe, run_phase
from tests.small_runs import Killed, assert_same_tensors, metrics, small_recipe, weights, write_prose


def test_it_rolls_back_once_with_half_the_rate(tmp_path: Path) -> None:
    recipe = phase_recipe(steps=6, save_every=2, learning_rate=2e-3)
    with pytest.warns(RunWarning, match="At step 4 the loss is nan; continuing from the checkpoint of step 2"):
        run_phase(tmp_path / "sick", recipe, callbacks=(At(3, poison, times=1),))
    rates = [line["learning_rate"] for line in metrics(tmp_path / "sick")]
    assert rates == pytest.approx([2e-3] * 2 + [1e-3] * 4)
    assert rolled_back(tmp_path / "sick" / "checkpoints") == {
        "step": 4,
        "to_step": 2,
        "reason": "loss is nan",
        "factor": 0.5,
    }
    # Nothing of the failure is left: it is the training whose rate was halved at the checkpoint.
    run_phase(tmp_path / "healthy", recipe, kill=3)
    note = (tmp_path / "sick" / "checkpoints" / "rolled_back.json").read_text()
    (tmp_path / "healthy" / "checkpoints" / "rolled_back.json").write_text(note)
    run_phase(tmp_path / "healthy", recipe, resume=True)
    assert metrics(tmp_path / "healthy") == metrics(tmp_path / "sick")
    place = "checkpoints/checkpoint-6"
    assert_same_tensors(weights(tmp_path / "sick" / place), weights(tmp_path / "healthy" / place))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [3, 5])
def test_a_phase_killed_after_it_rolled_back_goes_on_with_the_smaller_step(kill: int, tmp_path: Path) -> None:
    """Whether before its next checkpoint, when the old one is taken again, or after it."""
    recipe = prune_recipe(steps=6, save_every=2, schedule="cosine")
    with pytest.warns(RunWarning, match="continuing from the checkpoint of step 2"):
        run_phase(tmp_path / "whole", recipe, callbacks=(At(3, poison, times=1),))
    passed = []

    def poison_then_kill(model: Any) -> None:
        passed.append(True)
        if len(passed) == 1:
            poison(model)
        elif kill == 3:
            raise Killed

    with pytest.warns(RunWarning, match="continuing from the checkpoint of step 2"):
        run_phase(tmp_path / "killed", recipe, kill=5, callbacks=(At(3, poison_then_kill),))
    run_phase(tmp_path / "killed", recipe, resume=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    place = "checkpoints/checkpoint-6"
    assert_same_tensors(weights(tmp_path / "killed" / place), weights(tmp_path / "whole" / place))


def test_the_second_time_it_stops(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as caught, pytest.warns(RunWarning):
        run_phase(tmp_path, phase_recipe(steps=6, save_every=2), callbacks=(At(3, poison),))
    message = str(caught.value)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    assert message.startswith(f"Training stopped at step 4: the loss is nan; the last good checkpoint is {checkpoint}.")
    assert message.endswith("It had already rolled back from step 4 and continued with 0.5 times the learning rate.")
    assert "\n" not in message
    # Nothing half-written: the whole checkpoint, and a line for each step that was done.
    assert last_checkpoint(tmp_path / "checkpoints") == checkpoint
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    """The loss of the step before was that of good weights."""
    recipe = phase_recipe(steps=6, save_every=2)
    with (
        pytest.raises(DivergenceError, match="stopped at step 4: the weights' largest value is nan"),
        pytest.warns(RunWarning, match="At step 4 the weights' largest value is nan; continuing .* step 2"),
    ):
        run_phase(tmp_path, recipe, callbacks=(At(4, poison),))
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"


def test_without_a_checkpoint_it_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="stopped at step 4: .*; no checkpoint had been written yet"):
        train(tiny_model(), TEXT, phase_recipe(save_every=1), PhaseRun(callbacks=[At(3, poison)]))


def test_an_exploding_gradient_is_found_before_the_step(tmp_path: Path) -> None:
    """Once: the weights are those that they would be had it not been, but for the smaller step."""
    model = tiny_model()
    calls = 0

    def explode(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float("inf") if calls == 4 else gradient

    model.model.norm.weight.register_hook(explode)
    with pytest.warns(RunWarning, match="At step 4 the gradient norm is (nan|inf); continuing from .* step 2"):
        train(model, TEXT, phase_recipe(save_every=2), PhaseRun(folder=tmp_path))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gates_stay_float32_where_bfloat16_would_lose_their_steps() -> None:
    """A step that bfloat16 rounds away moves a gate, whatever the model is cast to."""
    model = tiny_model().to(torch.bfloat16)
    gates = deadhead.attach(model)
    model.to(torch.bfloat16).half()
    for _, gate in gates:
        assert gate.log_alpha_bias.dtype == torch.float32
        before = gate.log_alpha.clone()
        gate.set_log_alpha(before + 1e-4)
        assert (gate.log_alpha != before).all()
        assert torch.equal((before + 1e-4).bfloat16(), before.bfloat16())


@pytest.mark.slow
def test_a_run_notes_it_in_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(write_prose(tmp_path))
    run = Run.start(recipe, tmp_path / "run")
    poisoned = []

    def progress(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
        if (name, done) == ("prune", 3) and not poisoned:
            poisoned.append(True)
            raise_in_next_loss()

    original = deadhead.training.phases.trainer.LanguageModelTrainer.compute_loss

    def raise_in_next_loss() -> None:
        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(deadhead.training.phases.trainer.LanguageModelTrainer, "compute_loss", original)
            return original(self, *args, **kwargs) * float("nan")

        monkeypatch.setattr(deadhead.training.phases.trainer.LanguageModelTrainer, "compute_loss", compute_loss)

    run.progress = progress
    with pytest.warns(RunWarning, match="At step 4 the loss is nan"):
        summary = run.execute()
    assert summary["rolled_back"] == {
        "prune": {"step": 4, "to_step": 2, "reason": "loss is nan", "factor": 0.5},
    }
    assert read_summary(tmp_path / "run") == summary
