"""Training that is stopped by Ctrl-C or SIGTERM finishes its step and writes a checkpoint to resume from."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deadhead.training import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A scheduler such as Slurm signals all processes of a job, and its launcher passes the signal on to those it started:
# they get it twice, the second time within these seconds.
_PASSED_ON = 2.0


class Stopping(TrainerCallback):
    """Ends the training after the step in which a signal arrives, with a checkpoint of that step.

    Several processes agree on the step: each tells the others whether it got a signal. Add it after all callbacks that
    ask for a log or a checkpoint. `saves` says whether there is a folder for the checkpoint.
    """

    def __init__(self, *, saves: bool) -> None:
        self.saves = saves
        self.signal: int | None = None
        self.has_stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if this process or another one got a signal."""
        told = self.signal or 0
        if args.world_size > 1:
            numbers = torch.tensor(told, device=args.device)
            distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
            told = int(numbers)
        if told and state.global_step < state.max_steps:
            self.signal, self.has_stopped = told, True
            control.should_save = self.saves
            control.should_training_stop = True

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Delay a signal that arrives in the block until the step, and with it the block, has ended; then deliver it.

        A second signal is delivered at once, except for the same signal passed on by a launcher. Signals are not
        handled outside the main thread, or if they are ignored, as Ctrl-C is in a shell's background jobs.

        Raises:
            KeyboardInterrupt: after SIGINT, or after another signal that its handler lets pass.
        """
        passed_on = _PASSED_ON if processes.count() > 1 else 0.0
        first = math.inf
        is_main = threading.current_thread() is threading.main_thread()
        found = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
        handlers = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal first
            now = time.monotonic()
            first = min(first, now)
            if self.signal is None:
                self.signal = number
            elif number != self.signal or now - first >= passed_on:
                restore()
                signal.raise_signal(number)

        for number in handlers:
            signal.signal(number, note)
        try:
            yield
        except RuntimeError:
            restore()
            if self.signal is not None and processes.count() > 1:
                # The launcher ends this process since another is gone, which the connection to it noticed too.
                signal.raise_signal(self.signal)
            raise
        finally:
            restore()
        if self.signal is not None:
            signal.raise_signal(self.signal)
            if self.has_stopped:
                # A handler of the caller's own let it pass, but training has not come to its end.
                raise KeyboardInterrupt
