"""Projections: which are plain, and those of a few rows (R) at the speed of reading the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

# Rows up to which a matrix with a few columns is faster than a few rows with a matrix (measured).
_MOST_ROWS = 32


def is_plain(projection: nn.Module) -> TypeIs[nn.Linear]:
    """Return whether a projection is its weight and bias alone: not adapted, hooked, offloaded or quantised."""
    module: Any = projection
    return (
        type(projection) is nn.Linear
        and type(module.weight) is nn.Parameter
        # Accelerate puts a function of its own here, which fetches the weight.
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def project(projection: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a projection; in evaluation on a CPU a few rows the other way round.

    A matrix with few columns takes as long as reading the matrix does, few rows with a matrix three times as long.
    """
    rows = hidden.numel() // hidden.shape[-1]
    if (
        # Before the number of rows is asked for, which a compiled graph leaves open.
        torch.compiler.is_compiling()
        or not 0 < rows <= _MOST_ROWS
        # Reentrant checkpointing trains without gradients first, and must meet the same numbers when it recomputes.
        or projection.training
        or torch.is_grad_enabled()
        or hidden.device.type != "cpu"
        or hidden.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or not is_plain(projection)
        or projection.weight.dtype != torch.float32
        or projection.weight.device != hidden.device
    ):
        result: Tensor = projection(hidden)
        return result
    hidden_RD = hidden.reshape(rows, -1)
    # A single column would take the slow way after all.
    columns = torch.cat([hidden_RD, hidden_RD]).T if rows == 1 else hidden_RD.T
    # Products that come after need contiguous rows, or take a slow way too.
    product = torch.mm(projection.weight, columns)[:, :rows].T.contiguous().view(*hidden.shape[:-1], -1)
    bias: Tensor | None = projection.bias
    return product if bias is None else product + bias
