"""Sums over the rows of a tensor, a chunk of rows at a time, and their gradients without a second forward pass.

PyTorch's own `linear_cross_entropy` (from 2.13 on) does this for one linear layer and one loss. This module takes any
function, because output layers cap and scale their logits, and distillation compares two models.

Dimensions: N rows, D width, K sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers that are held at once for all rows of a chunk: 64 MiB in float32.
AT_ONCE = 2**24

# Takes (n, D) and n rows of every other tensor, and returns K sums over them.
Sums = Callable[..., Tensor]


def fits_at_once(rows: int, width: int) -> bool:
    """Return whether `width` numbers for each row are few enough to hold at once."""
    return rows * width <= AT_ONCE


def sum_in_chunks(
    sums: Sums, rows_ND: Tensor, others: Sequence[Tensor] = (), *, width: int, weights: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return the first of K sums over all rows, with gradient, and the other sums, (K − 1,), without.

    Rows that fit at once are one chunk, for which autograd works as usual. For more rows, gradients are computed along
    with the sums, chunk by chunk, so that nothing of a chunk is kept. Backward only scales them; call it once.

    Args:
        sums: computes K sums over some rows.
        rows_ND: the rows; they get a gradient if they need one.
        others: tensors with N rows each, without gradient.
        width: how many numbers `sums` makes of a row; a chunk has at most `AT_ONCE` of them.
        weights: leaves that `sums` uses; those that learn get a gradient.
    """
    most = max(1, AT_ONCE // width)
    if fits_at_once(len(rows_ND), width):
        found_K = sums(rows_ND, *others)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows_ND, *weights)):
        return cast(tuple[Tensor, Tensor], _SumInChunks.apply(sums, most, others, rows_ND, *weights))
    else:
        chunks = _chunks(len(rows_ND), most)
        found_K = torch.stack([sums(*(tensor[chunk] for tensor in (rows_ND, *others))) for chunk in chunks]).sum(0)
    return found_K[0], found_K[1:].detach()


def _chunks(count: int, most: int) -> list[slice]:
    """Return slices of at most `most` rows, as equal in size as possible."""
    size = -(-count // -(-count // most))
    return [slice(start, start + size) for start in range(0, count, size)]


class _SumInChunks(torch.autograd.Function):
    """Returns the first sum and the others; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, sums: Sums, most: int, others: Sequence[Tensor], rows_ND: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.needed = ctx.needs_input_grad[3:]
        ctx.dtypes = [tensor.dtype for tensor in (rows_ND, *weights)]
        found, of_rows = [], []
        gradients: list[Tensor | None] = [None] * sum(ctx.needed[1:])
        for chunk in _chunks(len(rows_ND), most):
            rows = rows_ND[chunk].detach().requires_grad_(ctx.needed[0])
            inputs = list(itertools.compress((rows, *weights), ctx.needed))
            with torch.enable_grad():
                found_K = sums(rows, *(other[chunk] for other in others))
                parts: list[Tensor | None] = [*torch.autograd.grad(found_K[0], inputs, allow_unused=True)]
            found.append(found_K.detach())
            if ctx.needed[0]:
                part = parts.pop(0)
                of_rows.append(torch.zeros_like(rows) if part is None else part)
            gradients = [_added(total, part, parts) for total, part in zip(gradients, parts, strict=True)]
            del parts
        gradients = [torch.cat(of_rows), *gradients] if ctx.needed[0] else gradients
        total_K = torch.stack(found).sum(0)
        ctx.gradients = gradients
        first, rest = total_K[0].clone(), total_K[1:].clone()
        ctx.mark_non_differentiable(rest)
        return first, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The gradients of a sum in chunks are there once; compute the sum anew.")
        gradients, ctx.gradients = iter(ctx.gradients), None
        # In place, as they may be as large as the weights.
        scaled: list[Tensor | None] = []
        for needs, dtype in zip(ctx.needed, ctx.dtypes, strict=True):
            gradient = next(gradients) if needs else None
            scaled.append(None if gradient is None else gradient.mul_(upstream).to(dtype))
        return (None, None, None, *scaled)


def _added(total: Tensor | None, part: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Add a part to a gradient, in place, and return the sum; None if there is neither."""
    if total is None and part is not None:
        # In half precision a long sum would stop growing.
        total = part.to(torch.promote_types(part.dtype, torch.float32))
        # Weights that are added to each other get one tensor between them.
        sharing = sum(other is not None and other.data_ptr() == total.data_ptr() for other in parts)
        return total.clone() if sharing > 1 or not total.is_contiguous() else total
    return total if total is None or part is None else total.add_(part)
