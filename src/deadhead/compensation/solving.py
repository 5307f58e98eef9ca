"""The ridge fit of one projection, and the choice of its ridge and target on held-out tokens.

Dimensions: N inputs of the projection (and a constant 1 where it has a bias), D outputs, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deadhead.compensation.moments import Moments

# Shares of the mean of diag C. The first is for what the inputs that are left can give exactly.
RIDGES = (1e-5, 0.03, 0.1, 0.3, 1.0, 3.0)
# Shares of the last target in the mix.
SHARES = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A projection that was fitted.

    Args:
        weight_DN: float64, the bias its last column where there is one.
        ridge: λ, as a share of the mean of diag C.
        share: how much of the target was the second one.
        before: held-out error of the projection as it was; see `Moments.error`.
        after: that of this one.
    """

    weight_DN: Tensor
    ridge: float
    share: float
    before: float
    after: float


def ridge_fits(moments: Moments, weight_DN: Tensor, ridge: float) -> Tensor | None:
    """Return (R_k + W Λ)(C + Λ)⁻¹ for each target k, (K, D, N); None where C + Λ cannot be inverted.

    Λ = ridge · mean diag C for the inputs, 0 for the constant: a bias is free, as if all were centred. The fit is drawn
    to the weight that there is, not to 0.
    """
    xx_NN = moments.xx_NN
    scale_N = torch.zeros(len(xx_NN), dtype=xx_NN.dtype, device=xx_NN.device)
    scale_N[: moments.inputs] = ridge * xx_NN.diagonal()[: moments.inputs].mean() if moments.inputs else 0.0
    factor_NN, info = torch.linalg.cholesky_ex(xx_NN + scale_N.diag())
    if bool(info):
        return None
    wanted_KDN = moments.yx_KDN + weight_DN * scale_N
    solved = torch.cholesky_solve(wanted_KDN.flatten(0, 1).T.contiguous(), factor_NN)
    return solved.T.reshape(wanted_KDN.shape)


def best_fit(fitted: Moments, held: Moments, weight_DN: Tensor) -> Fit | None:
    """Fit a projection to some tokens; choose ridge and target by its error on others.

    Args:
        fitted: moments of the tokens that are fitted to. Of two targets mixes are tried, and all are judged by their
            error against half of each: judged by either one, or by both errors' mean, a real model came out worse.
        held: of held-out tokens.
        weight_DN: the projection as it is, with its bias as the last column.

    Returns:
        The best fit; None where none is better than the projection as it is.
    """
    if not (fitted.is_finite and held.is_finite):
        return None
    weight_DN = weight_DN.to(fitted.xx_NN)
    count = len(fitted.yy_KK)
    goal_K, mixes_MK = _mixes(count, (0.5,), weight_DN)[0], _mixes(count, SHARES, weight_DN)
    before = float(held.errors(weight_DN[None], torch.ones_like(goal_K[:1, None]), goal_K))
    best: Fit | None = None
    for ridge in RIDGES:
        fits_KDN = ridge_fits(fitted, weight_DN, ridge)
        if fits_KDN is None:
            continue
        errors_M = held.errors(fits_KDN, mixes_MK, goal_K)
        index = int(errors_M.argmin())
        after = float(errors_M[index])
        if after < (before if best is None else best.after):
            found_DN = torch.einsum("k,kdn->dn", mixes_MK[index], fits_KDN)
            share = SHARES[index] if count == 2 else 0.0
            best = Fit(weight_DN=found_DN, ridge=ridge, share=share, before=before, after=after)
    return best


def _mixes(count: int, shares: Sequence[float], like: Tensor) -> Tensor:
    """Return for shares of the last of one or two targets how much of each target is in the mix, (M, K)."""
    values = [[1.0]] if count == 1 else [[1.0 - share, share] for share in shares]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
