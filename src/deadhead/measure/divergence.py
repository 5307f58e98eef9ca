"""How far a model's distribution is from another's: KL, with its gradient, in as few passes over all words as it takes.

Between an output layer and its gradient there is little to compute, but each operation reads and writes a number for
every token and word, and memory is slow. With logits z and log-probabilities log q of what is found, and log p of what
is expected,

    KL = Σ p (log p − log q),    ∂KL/∂z = q − p,

so the gradient is there once the sum is, in less than half of the time that PyTorch's own functions take for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def divergence(logits_NV: Tensor, expected_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the sum over tokens of KL(expected ‖ found), 0-dimensional, of distributions at a temperature.

    Only the first logits get a gradient, once. Sums are in float32 at least, as a softmax over many words needs it.
    """
    found: Tensor = _Divergence.apply(logits_NV, expected_NV.detach(), temperature)
    return found


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, as a softmax over many words needs them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Divergence(torch.autograd.Function):
    """KL and its gradient; what is written into was made here."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, expected_NV: Tensor, temperature: float) -> Tensor:
        found_NV, wanted_NV = (_log_softmax(values, temperature) for values in (logits_NV, expected_NV))
        expected_NV = wanted_NV.exp()
        # Not the difference of two large sums: of equal distributions this is 0.
        total = wanted_NV.sub_(found_NV).mul_(expected_NV).sum()
        if ctx.needs_input_grad[0]:
            ctx.dtype, ctx.temperature = logits_NV.dtype, temperature
            ctx.gradient_NV = found_NV.exp_().sub_(expected_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.gradient_NV is None:
            raise RuntimeError("The gradient of a divergence is there once; compute the divergence anew.")
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(upstream / ctx.temperature).to(ctx.dtype), None, None


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Return logarithms of probabilities, in a tensor of their own."""
    wide_NV = widened(logits_NV)
    # Most often it is 1, and memory need not be gone through.
    return torch.log_softmax(wide_NV if temperature == 1.0 else wide_NV / temperature, dim=-1)
