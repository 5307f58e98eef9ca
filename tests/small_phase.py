"""One phase of a tiny model on random tokens, to be stopped, damaged and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import deadhead
from deadhead.gates.gates import HeadGates
from deadhead.models import AllAttentionForCausalLM
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, train
from deadhead.training.phases.choosing import gate_config
from tests.random_models import tiny_model
from tests.small_runs import KillAt, Killed, stream

BATCH = 2
TEXT = stream(100)


def phase_recipe(**changes: Any) -> PhaseRecipe:
    """Return a recipe of 6 steps that logs each."""
    return PhaseRecipe(**{"steps": 6, "batch_size": BATCH, "learning_rate": 3e-3, "log_every": 1, **changes})


def prune_recipe(**changes: Any) -> PruneRecipe:
    """Return a recipe of 6 steps with gates that move fast."""
    values = {
        "steps": 6,
        "batch_size": BATCH,
        "learning_rate": 3e-3,
        "log_every": 1,
        "l0": 0.1,
        "gate_lr": 0.0,
        "gate_lr_scale": 100.0,
    }
    return PruneRecipe(**{**values, **changes})


def run_phase(
    folder: Path,
    recipe: PhaseRecipe,
    *,
    kill: int | None = None,
    resume: bool = False,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> tuple[AllAttentionForCausalLM, HeadGates | None]:
    """Train a fresh copy of one model; the recipe says whether with gates."""
    model = tiny_model(hidden_dropout=0.2, attention_dropout=0.1)
    gates = None
    if isinstance(recipe, PruneRecipe):
        gates = deadhead.attach(model, config=gate_config(recipe, model, seed=1))
    stops = () if kill is None else (KillAt(kill),)
    try:
        train(
            model,
            TEXT,
            recipe,
            PhaseRun(
                folder=folder / "checkpoints",
                gates=gates,
                metrics=folder / "metrics.jsonl",
                tensorboard=folder / "tensorboard",
                callbacks=(*callbacks, *stops),
                resume=resume,
            ),
        )
    except Killed:
        assert kill is not None
    return model, gates


class At(TrainerCallback):
    """Does something with the model at the end of a step, each time that it comes by, or a number of times."""

    def __init__(self, step: int, action: Any, *, times: int | None = None) -> None:
        self.step = step
        self.action = action
        self.times = times

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Act."""
        if state.global_step == self.step and self.times != 0:
            self.times = None if self.times is None else self.times - 1
            self.action(kw["model"])


@torch.no_grad()
def poison(model: Any) -> None:
    """Make a weight NaN."""
    model.model.norm.weight.fill_(float("nan"))
