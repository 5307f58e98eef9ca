"""Reports of a phase besides metrics.jsonl: TensorBoard, and trackers through the Trainer's integrations."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import InputError, is_installed, require_extra
from deadhead.gates.gates import HeadGates
from deadhead.plans.picture import head_map_image

if TYPE_CHECKING:  # TensorBoard is an extra
    from torch.utils.tensorboard.writer import SummaryWriter

# TensorBoard keeps ten of a series of images on its slider; so many are there to be chosen from.
_IMAGES = 20


@contextmanager
def tensorboard_callbacks(folder: Path, gates: HeadGates | None, *, begin: int) -> Iterator[list[TrainerCallback]]:
    """Yield callbacks that write TensorBoard events: the scalars of every log and, with gates, the head map.

    Without TensorBoard nothing is yielded or written. Events of a stopped run for steps later than `begin`, the step it
    resumes from, are hidden.
    """
    if not is_installed("tensorboard"):
        yield []
        return
    from torch.utils.tensorboard.writer import SummaryWriter

    with no_space_is_input_error(folder), _thread_speaks_through_its_writer():
        writer = SummaryWriter(log_dir=str(folder), purge_step=begin + 1)
        try:
            yield [TensorBoardCallback(writer), *([] if gates is None else [_HeadMapImage(writer, gates)])]
        finally:
            writer.close()


@contextmanager
def _thread_speaks_through_its_writer() -> Iterator[None]:
    """Keep TensorBoard's thread from printing write errors, because its writer raises the same when used next."""
    from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

    usual = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__module__ != event_file_writer.__name__:
            usual(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class _HeadMapImage(TrainerCallback):
    def __init__(self, writer: SummaryWriter, gates: HeadGates) -> None:
        self.writer = writer
        self.gates = gates

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the gates as they are now."""
        step = state.global_step
        if step % max(1, state.max_steps // _IMAGES) and step < state.max_steps:
            return
        found = self.gates.open_probability()
        for name, kind in (("head map", "head"), ("block map", "block")):
            rows = [p.tolist() for key, p in found.items() if key.kind == kind]
            if rows:
                self.writer.add_image(name, head_map_image(rows), step, dataformats="HWC")


def require_trackers(names: Sequence[str]) -> None:
    """Check that transformers knows these trackers and that they are installed; raise InputError if not."""
    if not names:
        return  # looking for what is installed takes a moment
    known, installed = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise InputError(
                f"A tracker that transformers reports to was expected ({', '.join(known)}), but got {name!r}."
            )
        if name == "tensorboard":
            require_extra("tensorboard", "tensorboard", what="Reporting to tensorboard")
        elif name not in installed:
            raise InputError(f"Reporting to {name} needs its package; install it with: pip install {name}.")
        elif name == "wandb":
            _require_wandb()


def _require_wandb() -> None:
    """Check that wandb can start a run without a prompt: it is logged in or offline."""
    import wandb

    # Older versions cannot be asked without their asking the user.
    can_be_asked = "prompt" in inspect.signature(wandb.login).parameters
    is_online = wandb.setup().settings.mode in ("online", "shared")
    if can_be_asked and is_online and not wandb.login(prompt=False, verify=False):
        raise InputError(
            "Reporting to wandb was asked for, but wandb is not logged in here; run wandb login, or set "
            "WANDB_MODE=offline to keep its files on this machine."
        )


@contextmanager
def tracker_callbacks(names: Sequence[str]) -> Iterator[list[TrainerCallback]]:
    """Yield the Trainer's own integrations of trackers; they come last, to see what deadhead's callbacks add to a log.

    TensorBoard is left out, because it is written in any case.
    """
    others = [name for name in names if name != "tensorboard"]
    try:
        yield [make() for make in get_reporting_integration_callbacks(others)]
    finally:
        # The integration leaves its run open, which the next phase would go on in, from step 0.
        if "wandb" in names and "wandb" in sys.modules:
            sys.modules["wandb"].finish()
