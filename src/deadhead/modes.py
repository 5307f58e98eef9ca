"""Where and how modules run: the device there is, evaluation for a while, denormal numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def best_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Take denormal numbers for zero on the CPU, which they can slow down several times, and stop that afterwards."""
    # There is no way to ask but to try: the smallest normal float, halved.
    was_on = bool(torch.tensor(torch.finfo(torch.float32).tiny) * 0.5 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Put `roots` into evaluation mode; each of their modules gets its own mode back afterwards."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
