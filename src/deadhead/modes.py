"""Switch modules to evaluation for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
