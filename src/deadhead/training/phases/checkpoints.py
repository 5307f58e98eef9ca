"""The checkpoints that a phase writes while it trains: which exist, which are complete, and which one to resume."""

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
    """Return the checkpoint folders in `output_dir`, complete or not, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=checkpoint_step)


# What transformers writes in torch's own format beside the weights.
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def finish_checkpoint(checkpoint: Path, *, keep: int) -> None:
    """Mark a checkpoint as complete, and delete older ones so that `keep` remain, this one included.

    The list of its files' hashes is written last: a checkpoint without it was interrupted, and is deleted. Newer
    checkpoints are deleted too: they must be damaged, because training would have resumed from a complete one.
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
    """Return the newest checkpoint in `output_dir` whose files are all unchanged since they were written, or None."""
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
    """Check that files in torch's own format hold only tensors and plain values: anything else could run code.

    Hashes do not protect from this: whoever changed a file may have rewritten them. Only the pickle's list of types is
    read; nothing in it is run.
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
    """Return the newest checkpoint in `output_dir` that was written completely, or None; its files are not read."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if _is_finished(folder)), None)


def _is_finished(checkpoint: Path) -> bool:
    return (checkpoint / CHECKSUMS_FILE).is_file()
