"""A symmetric matrix and its Cholesky factor in the memory of one: the factor lies below the diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A wider matrix is factored block by block; for smaller ones the memory of a factor is small.
_WHOLE = 4096
_BLOCK = 1024


@contextmanager
def factored(matrix_NN: Tensor, ridge_N: Tensor) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """Factor A + diag r in A's own memory while the block runs; yield a solver of X (A + diag r) = Y, or None.

    The solver overwrites Y, (M, N), and returns it. None is yielded if A + diag r is not positive definite. A is
    symmetric: its blocks above the diagonal stay, and those below are restored from them at the end. Until then A must
    not be read.
    """
    width = len(matrix_NN)
    step = width if width <= _WHOLE else _BLOCK
    places = [slice(start, min(start + step, width)) for start in range(0, width, max(step, 1))]
    try:
        diagonal = _factor(matrix_NN, ridge_N, places)
        yield None if diagonal is None else lambda y_MN: _solve(matrix_NN, diagonal, places, y_MN)
    finally:
        for at in places:
            matrix_NN[at.stop :, at] = matrix_NN[at, at.stop :].T


def _factor(matrix_NN: Tensor, ridge_N: Tensor, places: list[slice]) -> list[Tensor] | None:
    """Return the factor's blocks on the diagonal; those below are written into the matrix."""
    diagonal: list[Tensor] = []
    info = torch.empty((), dtype=torch.int32, device=matrix_NN.device)
    for at in places:
        before, below = slice(0, at.start), slice(at.stop, None)
        left = matrix_NN[at, before]
        # In place, and column by column as LAPACK stores it, so that no copy is made.
        block = matrix_NN[at, at].clone().T
        block.diagonal().add_(ridge_N[at])
        if at.start:
            block.addmm_(left, left.T, alpha=-1)
        torch.linalg.cholesky_ex(block, out=(block, info))
        if bool(info):
            return None
        diagonal.append(block)
        panel = matrix_NN[below, at]
        if at.start:
            panel.addmm_(matrix_NN[below, before], left.T, alpha=-1)
        if len(panel):
            panel.copy_(torch.linalg.solve_triangular(block.T, panel, upper=True, left=False))
    return diagonal


def _solve(factor_NN: Tensor, diagonal: list[Tensor], places: list[slice], y_MN: Tensor) -> Tensor:
    for at, block in zip(places, diagonal, strict=True):
        part = y_MN[:, at]
        if at.start:
            part.addmm_(y_MN[:, : at.start], factor_NN[at, : at.start].T, alpha=-1)
        part.copy_(torch.linalg.solve_triangular(block, part.T, upper=False).T)
    for at, block in zip(reversed(places), reversed(diagonal), strict=True):
        part = y_MN[:, at]
        if at.stop < len(factor_NN):
            part.addmm_(y_MN[:, at.stop :], factor_NN[at.stop :, at], alpha=-1)
        part.copy_(torch.linalg.solve_triangular(block.T, part.T, upper=True).T)
    return y_MN
