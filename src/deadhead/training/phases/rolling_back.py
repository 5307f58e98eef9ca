"""Rolling back, once, to the last good checkpoint with a smaller step, after a loss or gradient that is not finite."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from deadhead.disk.files import write_json
from deadhead.disk.reading import read_object
from deadhead.errors import DivergenceError, RunWarning
from deadhead.training.phases.checkpoints import checkpoint_step, last_checkpoint

_FILE = "rolled_back.json"

# What the learning rate is multiplied by from then on.
FACTOR = 0.5


def rolled_back(folder: Path) -> dict[str, Any] | None:
    """Return how a phase rolled back, given the folder of its checkpoints, or None if it never did.

    The result has the `step` that failed, the checkpoint's step (`to_step`), the `reason`, and the `factor` that the
    learning rate is multiplied by since then.
    """
    path = folder / _FILE
    return dict(read_object(path, what="note of a phase that rolled back")) if path.exists() else None


def roll_back(folder: Path, error: DivergenceError) -> None:
    """Record that the phase continues from its last good checkpoint with a smaller step; the main process calls this.

    If the phase rolled back before, or there is no checkpoint, raise the error.
    """
    before = rolled_back(folder)
    if before is not None:
        raise DivergenceError(
            f"{error} It had already rolled back from step {before['step']} and continued with {before['factor']} "
            "times the learning rate."
        ) from error
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise error
    to_step = checkpoint_step(checkpoint)
    write_json(folder / _FILE, {"step": error.step, "to_step": to_step, "reason": error.reason, "factor": FACTOR})
    warnings.warn(
        f"At step {error.step} the {error.reason}; continuing from the checkpoint of step {to_step} with {FACTOR} "
        "times the learning rate.",
        RunWarning,
        stacklevel=2,
    )


class SmallerStep(TrainerCallback):
    """Reduces the learning rate that a checkpoint from before the failure contains."""

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Scale the optimizer and the schedule; checkpoints written from now on include the change."""
        for group in kwargs["optimizer"].param_groups:
            group["lr"] *= FACTOR
            group["initial_lr"] *= FACTOR
        # Accelerate wraps the scheduler.
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        scheduler.base_lrs = [rate * FACTOR for rate in scheduler.base_lrs]
        # What is logged of the first step.
        scheduler._last_lr = [rate * FACTOR for rate in scheduler.get_last_lr()]


def smaller_step(folder: Path, checkpoint: Path | None) -> list[TrainerCallback]:
    """Return the callback that makes the step smaller for a phase resumed from `checkpoint`, if it is still needed."""
    before = rolled_back(folder)
    is_due = before is not None and checkpoint is not None and checkpoint_step(checkpoint) <= before["to_step"]
    return [SmallerStep()] if is_due else []
