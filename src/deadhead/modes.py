"""How modules run: device and free memory, temporary evaluation mode, restoring after failures, denormals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_Module = TypeVar("_Module", bound=nn.Module)
_chosen: ContextVar[torch.device | None] = ContextVar("chosen_device", default=None)


@contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """Make `best_device` return `device` while the block runs; None changes nothing."""
    before = _chosen.set(device or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(before)


def best_device() -> torch.device:
    """Return the device set by `on_device`, or this machine's accelerator, or the CPU if it has none."""
    if (chosen := _chosen.get()) is not None:
        return chosen
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def has_hooks(model: nn.Module) -> bool:
    """Return whether accelerate has put hooks on a module of a model, as it does to give modules their devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def moved(model: _Module, device: torch.device) -> _Module:
    """Move a model to a device, and return it; one whose modules accelerate has given their devices stays there."""
    if not has_hooks(model):
        model.to(device)
    return model


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device, within the limit of the container if there is one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no such file, or no limit in it
        most, used = (int((_CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - used)
    return free


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero on the CPU while the block runs; they can slow it down several times."""
    # torch does not report the setting, so try it: halve the smallest normal float.
    was_on = bool(torch.tensor(torch.finfo(torch.float32).tiny) * 0.5 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Put `roots` into evaluation mode while the block runs; afterwards each module has its own mode again."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters while the block runs, so that autograd keeps nothing for their gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly while the block runs."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def seeded() -> Iterator[None]:
    """Seed torch's random numbers while the block runs; afterwards the random state is as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was if the block raises: classes, attributes, hooks, parameters, `requires_grad`, modes.

    Parameters go back to their device. Tensors and configurations that were replaced are put back, but values that were
    written into one stay, and so do values that were written into the buffers of a model that was moved.
    """
    modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
    # The tables themselves, not copies, because the handles of hooks refer to them.
    tables = [value for _, _, values in modules for value in values.values() if isinstance(value, dict | set | list)]
    contents = [(table, copy.copy(table)) for table in tables]
    buffers = [(module, name, b) for module, _, _ in modules for name, b in module._buffers.items() if b is not None]
    parameters = [(p, p.device, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, name, buffer in buffers:
            now = module._buffers.get(name)
            if now is not None and now is not buffer and now.shape == buffer.shape:
                # Moving a model makes new buffers (but no new parameters), and training goes on in those.
                with suppress(RuntimeError), torch.no_grad():
                    buffer.copy_(now)
        for module, kind, values in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(values)
        for table, before in contents:
            table.clear()
            put: Any = table.extend if isinstance(table, list) else table.update
            put(before)
        for parameter, device, learns, gradient in parameters:
            if parameter.device != device:
                with suppress(RuntimeError):  # a device that has failed returns nothing
                    parameter.data = parameter.data.to(device)
            parameter.requires_grad_(learns)
            parameter.grad = gradient
        raise
