"""The checkpoints that a phase leaves on its way: which there are, which are whole, and which one to go on from."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadhead.disk.checksums import CHECKSUMS_FILE, changed_file, write_checksums
from deadhead.errors import InputError, RunWarning


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, whole or not, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=checkpoint_step)


# What transformers writes in torch's own format beside the weights.
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named by."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def finish_checkpoint(checkpoint: Path, *, keep: int) -> None:
    """Note that all of a checkpoint is there, and let others go but for the newest, `keep` of them with this one.

    The list of its files' hashes comes last: a checkpoint without it was cut short, and goes. So do newer ones, which
    must be damaged: from a whole one training would have gone on.
    """
    write_checksums(checkpoint)
    others = [path for path in checkpoints(checkpoint.parent) if path != checkpoint]
    earlier = [path for path in others if checkpoint_step(path) < checkpoint_step(checkpoint) and _is_finished(path)]
    for path in others:
        if path not in earlier[len(earlier) - (keep - 1) :]:
            # First the list: what is half removed must not pass for whole.
            (path / CHECKSUMS_FILE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint in `output_dir` whose files are all there as they were written, or None."""
    for folder in reversed(checkpoints(output_dir)):
        if not _is_finished(folder):
            continue
        try:
            changed = changed_file(folder)
        except InputError:
            changed = CHECKSUMS_FILE
        if changed is None:
            return folder
        warnings.warn(
            f"The checkpoint {folder} is damaged: {changed} is not what was written there; the checkpoint is skipped.",
            RunWarning,
            stacklevel=2,
        )
    return None


def require_tensors(checkpoint: Path) -> None:
    """Check that what transformers keeps in torch's own format is tensors and plain values: others could run any code.

    Its hashes may have been written anew by whoever changed it. Nothing of a pickle but its list of types is run.
    """
    for path in sorted(path for ending in _TORCH_FILES for path in checkpoint.glob(ending)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged files end in many kinds of errors
            raise InputError(
                f"{path} is damaged or holds more than tensors and plain values, and reading that could run any code; "
                f"delete {checkpoint}, then the phase continues from an earlier checkpoint, or starts again."
            ) from error


def newest_finished(output_dir: Path) -> Path | None:
    """Return the newest checkpoint in `output_dir` that was written to its end, without reading it, or None."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if _is_finished(folder)), None)


def _is_finished(checkpoint: Path) -> bool:
    return (checkpoint / CHECKSUMS_FILE).is_file()
