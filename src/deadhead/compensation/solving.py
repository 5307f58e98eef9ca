"""The ridge fit of one projection, and the choice of its ridge and target on held-out tokens.

Dimensions: N inputs of the projection (and a constant 1 where it has a bias), D outputs, K targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deadhead.compensation.factoring import factored
from deadhead.compensation.moments import HeldRows, Moments

# Ridges, as shares of the mean of diag C. The first is for targets that the remaining inputs can reproduce exactly.
RIDGES = (1e-5, 0.03, 0.1, 0.3, 1.0, 3.0)
# Shares of the last target in the mix.
SHARES = (0.0, 0.5, 1.0)
# The most outputs by which ridge and target are chosen.
JUDGES = 1024


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted projection.

    Args:
        weight_DN: float64, or float32 if there are many outputs of a smaller dtype. A bias is the last column.
        ridge: λ, as a share of the mean of diag C.
        share: the share of the second target.
        before: held-out error before the fit; see `Moments.errors`.
        after: held-out error after the fit.
    """

    weight_DN: Tensor
    ridge: float
    share: float
    before: float
    after: float


def ridge_fits(moments: Moments, weight_DN: Tensor, ridge: float, outputs: slice = slice(None)) -> Tensor | None:
    """Return (R_k + W Λ)(C + Λ)⁻¹ for each target k, (K, D, N); None if C + Λ cannot be inverted.

    Λ is ridge · mean diag C for the inputs and 0 for the constant: a bias is free, as if all inputs were centred. The
    fit is drawn to the present weight, not to 0. It is possible to fit only some of the outputs.
    """
    with _solver(moments, ridge) as solve:
        return None if solve is None else solve(moments.yx_KDN[:, outputs], weight_DN[outputs])


@contextmanager
def _solver(moments: Moments, ridge: float) -> Iterator[Callable[[Tensor, Tensor], Tensor] | None]:
    """Yield a function that solves for some outputs, given R_k, (K, D, N), and W, (D, N); None if it cannot be solved.

    While the block runs, C is overwritten; see `factored`.
    """
    xx_NN = moments.xx_NN
    scale_N = torch.zeros(len(xx_NN), dtype=xx_NN.dtype, device=xx_NN.device)
    scale_N[: moments.inputs] = ridge * xx_NN.diagonal()[: moments.inputs].mean() if moments.inputs else 0.0
    with factored(xx_NN, scale_N) as solve:

        def fits(yx_KDN: Tensor, weight_DN: Tensor) -> Tensor:
            assert solve is not None, "this ridge can be used"
            wanted_KDN = yx_KDN + weight_DN.to(xx_NN) * scale_N
            return solve(wanted_KDN.flatten(0, 1)).reshape(wanted_KDN.shape)

        yield None if solve is None else fits


def best_fit(fitted: Moments, held: Moments | HeldRows, weight_DN: Tensor) -> Fit | None:
    """Fit a projection to some tokens; choose ridge and target by the error on held-out tokens.

    If there are many outputs, ridge and target are chosen by every n-th of them.

    Args:
        fitted: moments of the tokens to fit to. If there are two targets, mixes of them are tried, and all fits are
            judged by their error against half of each. (Judging by either target, or by the mean of both errors, gave
            worse results on a real model.)
        held: moments of held-out tokens.
        weight_DN: the present weight, with the bias as the last column.

    Returns:
        The best fit; None if none is better than the present weight.
    """
    if not (fitted.is_finite and held.is_finite):
        return None
    count = len(fitted.yy_KK)
    goal_K, mixes_MK = _mixes(count, (0.5,), fitted.xx_NN)[0], _mixes(count, SHARES, fitted.xx_NN)
    itself_11 = torch.ones_like(goal_K[:1, None])
    outputs = slice(None, None, -(-len(weight_DN) // JUDGES))
    before = float(held.errors(weight_DN[None, outputs], itself_11, goal_K, outputs))
    best: tuple[float, float, int, Tensor] | None = None  # error, ridge, mix, weight
    for ridge in RIDGES:
        fits_KDN = ridge_fits(fitted, weight_DN, ridge, outputs)
        if fits_KDN is None:
            continue
        errors_M = held.errors(fits_KDN, mixes_MK, goal_K, outputs)
        index = int(errors_M.argmin())
        if float(errors_M[index]) < (before if best is None else best[0]):
            found_DN = torch.einsum("k,kdn->dn", mixes_MK[index], fits_KDN)
            best = float(errors_M[index]), ridge, index, found_DN
    if best is None:
        return None
    after, ridge, index, found_DN = best
    if len(found_DN) < len(weight_DN):
        before = float(held.errors(weight_DN[None], itself_11, goal_K))
        found_DN = _all_outputs(fitted, weight_DN, ridge, mixes_MK[index])
        after = float(held.errors(found_DN[None], itself_11, goal_K))
        if not after < before:
            return None
    share = SHARES[index] if count == 2 else 0.0
    return Fit(weight_DN=found_DN, ridge=ridge, share=share, before=before, after=after)


def _all_outputs(fitted: Moments, weight_DN: Tensor, ridge: float, mix_K: Tensor) -> Tensor:
    """Return the fit of all outputs to a mix of the targets, (D, N), computed for some outputs at a time."""
    found_DN = weight_DN.new_empty(weight_DN.shape, dtype=torch.promote_types(weight_DN.dtype, torch.float32))
    with _solver(fitted, ridge) as solve:
        assert solve is not None, "this ridge was chosen"
        for start in range(0, len(weight_DN), JUDGES):
            some = slice(start, start + JUDGES)
            yx_1DN = torch.einsum("k,kdn->dn", mix_K, fitted.yx_KDN[:, some].to(mix_K))[None]
            found_DN[some] = solve(yx_1DN, weight_DN[some])[0]
    return found_DN


def _mixes(count: int, shares: Sequence[float], like: Tensor) -> Tensor:
    """Return the shares of each of one or two targets in the mixes, (M, K), given the shares of the last."""
    values = [[1.0]] if count == 1 else [[1.0 - share, share] for share in shares]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
