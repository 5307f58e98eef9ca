"""Several processes of one training, started by torchrun or `accelerate launch`: which one is main, and who does what.

All processes train. Work that is done once, such as writing a folder or measuring a model, is done by the main process
while the others wait; if it fails, all of them fail. With one process, everything here is a plain call.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, all_reduce
from transformers import TrainingArguments

from deadhead.data.shares import ALONE, Shares
from deadhead.errors import DivergenceError, FailedElsewhere, InputError
from deadhead.modes import best_device

# How long processes wait for one another: turning a large text into tokens takes hours. A launcher ends the others at
# once when one of them ends, so that only a process that hangs is waited for so long.
_PATIENCE = timedelta(hours=6)

_T = TypeVar("_T")

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with the name of the current work, how much is done, how much there is in total, and the last numbers."""


def count() -> int:
    """Return how many processes train together; if there are several, connect them first.

    This function and those below raise InputError if the environment says that there are several processes, but they
    cannot connect.
    """
    return 1 if _launched() == 1 else _state().num_processes


def is_main() -> bool:
    """Return whether this process is the main one, or the only one."""
    return _launched() == 1 or _state().is_main_process


def told(progress: Progress | None) -> Progress:
    """Return the progress function in the main process, and one that does nothing in the others."""
    return progress if progress is not None and is_main() else lambda *_: None


def counted(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Return a function that reports progress under `name`, given how much is done and how much there is in total."""
    return lambda done, total: progress(name, done, total, {})


def on_main(work: Callable[[], _T]) -> _T:
    """Run `work` in the main process while the others wait, and return its result in all processes.

    The result must be small and picklable, without tensors on a GPU.

    Raises:
        InputError, DivergenceError: in all processes, if `work` raises them.
        FailedElsewhere: in the other processes, if `work` raises anything else.
    """
    if count() == 1:
        return work()
    # Nobody may still look at files that are written now.
    _state().wait_for_everyone()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except BaseException as error:
            known = isinstance(error, (InputError, DivergenceError))
            broadcast_object_list([None, error if known else FailedElsewhere("The main process failed.")])
            raise
    broadcast_object_list(outcome)
    result, failure = outcome
    if isinstance(failure, FailedElsewhere):
        raise failure
    if failure is not None:
        raise failure from FailedElsewhere("The main process failed.")
    return result


def together(work: Callable[[Shares], _T]) -> _T:
    """Run `work` in all processes, each with its share of a text, and return the main one's result in all of them.

    After it has read the text, `work` may depend on the process only through its `Shares`. Its result must be one that
    `on_main` could return.

    Raises:
        InputError, DivergenceError: in all processes, if `work` raises them in any process.
        FailedElsewhere: in the other processes, if `work` raises anything else.
    """
    if count() == 1:
        return work(ALONE)
    shares = _Together()
    try:
        return shares.agreed(work(shares))
    except Exception as error:
        shares.tell(error)
        raise


class _Together(Shares):
    """The shares of the processes that are connected.

    Before any exchange, each process tells the others whether it got this far, so that none waits for a failed one.
    """

    def __init__(self) -> None:
        state = _state()
        self.count, self.index, self._device = state.num_processes, state.process_index, state.device
        self._is_over = False

    def total(self, *sums: Tensor) -> None:
        self._meet(None)
        for values in sums:
            # The backend may know the tensors of one device only.
            here = values.to(self._device).contiguous()
            all_reduce(here)
            if here is not values:
                values.copy_(here)

    def of_main(self, work: Callable[[], _T]) -> _T:
        values: list[Any] = [work() if self.index == 0 else None]
        self._meet(None)
        broadcast_object_list(values)
        found: _T = values[0]
        return found

    def undivided(self) -> Shares:
        return _Undivided(self)

    def tell(self, error: Exception) -> None:
        """Tell the others that this process failed, unless another process failed before."""
        if not self._is_over:
            known = isinstance(error, (InputError, DivergenceError))
            self._meet(error if known else FailedElsewhere("Another process failed."))

    def _meet(self, failure: Exception | None) -> None:
        # Nor is anything exchanged if the connection breaks here.
        self._is_over = True
        others = [each for each in gather_object([failure]) if each is not None]
        if failure is None and others:
            raise others[0] from FailedElsewhere("Another process failed.")
        self._is_over = failure is not None


class _Undivided(Shares):
    """The shares of several processes, each of which reads everything."""

    def __init__(self, others: Shares) -> None:
        self._others = others

    def of_main(self, work: Callable[[], _T]) -> _T:
        return self._others.of_main(work)


def main_first(work: Callable[[], _T]) -> _T:
    """Run `work` first in the main process, then in the others, which find what it wrote; return its local result."""
    done: list[_T] = []
    on_main(lambda: done.append(work()))
    return done[0] if done else work()


def require_supported(args: TrainingArguments) -> None:
    """Check that gates can learn under the engine that a Trainer uses; raise InputError if not."""
    kind = PartialState._shared_state.get("distributed_type", DistributedType.NO)
    if args.deepspeed is not None or kind == DistributedType.DEEPSPEED:
        raise InputError(
            "SparsityCallback cannot add gradients under DeepSpeed, which steps inside backward; use DDP or FSDP2."
        )
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if kind == DistributedType.FSDP and plugin is not None and plugin.fsdp_version != 2:
        raise InputError(
            "FSDP1 gives a process flat pieces of parameters, in which gates cannot be told apart; "
            'use FSDP2: fsdp_config={"version": 2}, or accelerate launch --fsdp_version 2.'
        )
    if kind == DistributedType.MEGATRON_LM:
        raise InputError("SparsityCallback does not work with Megatron-LM's own models; use DDP or FSDP2.")
    if args.n_gpu > 1:
        raise InputError(
            f"This process would spread batches over {args.n_gpu} GPUs, in copies of the model that share no gates; "
            "start one process a GPU with torchrun, or choose one with CUDA_VISIBLE_DEVICES."
        )


def require_data_parallel() -> None:
    """Check that every process of a phase of deadhead's own holds the whole model, because it is cut afterwards."""
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise InputError(
                f"deadhead's own commands train data-parallel, but the launcher asks for {what}; start them with "
                "torchrun, or use SparsityCallback in your own Trainer script, which FSDP2 may shard."
            )


def leave() -> bool:
    """Disconnect from the other processes at the end of the program; return whether this is the main one."""
    main = is_main()
    if _launched() > 1:
        _state().destroy_process_group()
    return main


def _launched() -> int:
    """Return how many processes the launcher started, according to the environment."""
    value = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(value)) if value.isdigit() else 1


def _state() -> PartialState:
    # Asked for anew each time: transformers' TrainingArguments resets it, and keeps the process group.
    try:
        with _ended_at_once():
            state = PartialState(cpu=best_device().type == "cpu", timeout=_PATIENCE, **_own_store())
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"WORLD_SIZE says that {_launched()} processes train together, but they cannot be connected ({reason}); "
            "start them with torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from error
    if state.num_processes == 1:
        raise InputError(
            f"WORLD_SIZE says that {_launched()} processes train together, but torch cannot connect them on this "
            "device; train with one process, and unset WORLD_SIZE."
        )
    return state


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let SIGTERM end this process at once while it connects, before it has written anything.

    Python runs no signal handler while torch waits for another process, which may have ended because of bad input.
    """
    if torch.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _own_store() -> dict[str, Any]:
    """Return settings by which processes that the launcher restarted find one another; {} at the first start.

    torchrun gives them the store of the failed processes, with their addresses, and a process that looks up an old
    address waits.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or torch.distributed.is_initialized():
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
    ranks = {"rank": int(os.environ["RANK"]), "world_size": _launched()}
    return {"store": PrefixStore(f"deadhead/connection/{attempt}", store), **ranks}
