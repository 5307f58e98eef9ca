"""Weighted second moments of a projection's inputs and targets, gathered batch by batch.

Dimensions: R tokens, N inputs of the projection (and a constant 1 where it has a bias), D outputs, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deadhead.data.shares import Shares

_TINY = 1e-300
# Blocks on the diagonal of a matrix of moments; four blocks save three eighths of the FLOPs.
_BLOCKS = 4
# Outputs, or inputs, whose products with all inputs are computed, or converted to float64, at once.
_OUTPUTS = 1024
# The largest Σ w y xᵀ (in numbers) that is summed in float64: a quarter of a gigabyte.
_MOST_PRECISE = 1 << 25


class Moments:
    """Σ w x xᵀ, Σ w y xᵀ and Σ w yᵀy over tokens: all that a least-squares fit, and its error on a text, depend on.

    Products within a batch are at least float32, and their sums float64, except Σ w y xᵀ of very large projections. The
    memory needed does not grow with the text.

    Args:
        inputs: N, without the constant.
        outputs: D.
        targets: K, the number of targets that a projection could be fitted to.
        has_bias: whether inputs end with a constant 1, whose column of the weight is the bias.
        device: the device of the sums; the CPU for a device without float64.
    """

    def __init__(self, inputs: int, outputs: int, targets: int, *, has_bias: bool, device: torch.device) -> None:
        self.inputs, self.has_bias = inputs, has_bias
        place = torch.device("cpu") if device.type == "mps" else device
        width = inputs + has_bias
        self.xx_NN = torch.zeros(width, width, dtype=torch.float64, device=place)
        numbers = targets * outputs * width
        products = torch.float64 if numbers <= _MOST_PRECISE else torch.float32
        self.yx_KDN = torch.zeros(targets, outputs, width, dtype=products, device=place)
        self.yy_KK = torch.zeros(targets, targets, dtype=torch.float64, device=place)
        self.tokens = 0

    def add(self, x_RN: Tensor, targets: Sequence[Tensor], weight_R: Tensor) -> None:
        """Add some tokens: inputs (R, N) without the constant, for each target (R, D), and weights (R,)."""
        x_RN, y_KRD = _weighted(x_RN, targets, weight_R, has_bias=self.has_bias)
        _add_gram(self.xx_NN, x_RN)
        for total_DN, y_RD in zip(self.yx_KDN, y_KRD, strict=True):
            for total_dN, y_Rd in zip(total_DN.split(_OUTPUTS), y_RD.split(_OUTPUTS, dim=1), strict=True):
                total_dN += (y_Rd.T @ x_RN).to(total_dN)
        self.yy_KK += torch.einsum("krd,lrd->kl", y_KRD, y_KRD).to(self.yy_KK)
        self.tokens += len(x_RN)

    def add_others(self, shares: Shares) -> None:
        """Add the tokens of the other processes."""
        tokens = torch.tensor(self.tokens)
        shares.total(tokens, self.xx_NN, self.yx_KDN, self.yy_KK)
        self.tokens = int(tokens)

    def errors(self, weights_LDN: Tensor, mixes_ML: Tensor, goal_K: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Return Σ w ‖y − W x‖² over Σ w ‖y‖² for mixes W of some weights, (M,).

        Args:
            weights_LDN: weights of any dtype; products are float64.
            mixes_ML: the share of each weight in each W.
            goal_K: the share of each target in y; shares sum to 1.
            outputs: the outputs, of all D, that the weights compute; errors are then exact up to a constant.
        """
        total = goal_K @ self.yy_KK @ goal_K
        across_L = goal_K.new_zeros(len(weights_LDN))
        squares_LL = goal_K.new_zeros(len(weights_LDN), len(weights_LDN))
        yx_KDN = self.yx_KDN[:, outputs]
        for some_LdN, yx_KdN in zip(weights_LDN.split(_OUTPUTS, dim=1), yx_KDN.split(_OUTPUTS, dim=1), strict=True):
            weights_LdN = some_LdN.to(goal_K)
            goal_dN = torch.einsum("k,kdn->dn", goal_K, yx_KdN.to(goal_K))
            across_L += torch.einsum("ldn,dn->l", weights_LdN, goal_dN)
            squares_LL += (weights_LdN @ self.xx_NN).flatten(1) @ weights_LdN.flatten(1).T
        lost_M = total - 2 * mixes_ML @ across_L + ((mixes_ML @ squares_LL) * mixes_ML).sum(-1)
        return lost_M / total.clamp(min=_TINY)

    @property
    def is_finite(self) -> bool:
        """Whether no sum has overflowed."""
        return all(map(_is_finite, (self.xx_NN, self.yx_KDN, self.yy_KK)))


class HeldRows:
    """The tokens themselves, with the interface of `Moments`, for texts with fewer tokens than a projection has inputs.

    In this case they need less memory than moments, and errors need less time.

    Args:
        has_bias: whether inputs end with a constant 1, whose column of the weight is the bias.
    """

    def __init__(self, *, has_bias: bool) -> None:
        self._has_bias = has_bias
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []
        self.tokens = 0

    def add(self, x_RN: Tensor, targets: Sequence[Tensor], weight_R: Tensor) -> None:
        """Add some tokens; see `Moments.add`."""
        x_RN, y_KRD = _weighted(x_RN, targets, weight_R, has_bias=self._has_bias)
        self._x.append(x_RN)
        self._y.append(y_KRD)
        self.tokens += len(x_RN)

    def add_others(self, shares: Shares) -> None:
        """Add the tokens of the other processes; `add` must have been called before, if only with no token."""
        if shares.count > 1:
            self._x = [shares.joined(torch.cat(self._x))]
            self._y = [shares.joined(torch.cat(self._y, dim=1).transpose(0, 1)).transpose(0, 1)]
            self.tokens = len(self._x[0])

    def errors(self, weights_LDN: Tensor, mixes_ML: Tensor, goal_K: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Return errors; see `Moments.errors`."""
        lost_M, total = torch.zeros_like(mixes_ML[:, 0]), torch.zeros_like(goal_K[0])
        for x_RN, y_KRD in zip(self._x, self._y, strict=True):
            x_RN, y_KRD = x_RN.to(goal_K), y_KRD[..., outputs]
            for weights_LdN, y_KRd in zip(weights_LDN.split(_OUTPUTS, 1), y_KRD.split(_OUTPUTS, 2), strict=True):
                wanted_Rd = torch.einsum("k,krd->rd", goal_K, y_KRd.to(goal_K))
                given_LRd = x_RN @ weights_LdN.to(goal_K).transpose(1, 2)
                for place, mix_L in enumerate(mixes_ML):
                    lost_M[place] += (wanted_Rd - torch.einsum("l,lrd->rd", mix_L, given_LRd)).square().sum()
                total += wanted_Rd.square().sum()
        return lost_M / total.clamp(min=_TINY)

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(map(_is_finite, (*self._x, *self._y)))


def _is_finite(values: Tensor) -> bool:
    # If a number is not finite, neither is the sum; for a float64 sum, torch would copy what it sums to float64.
    return all(bool(part.sum(dtype=torch.float64).isfinite()) for part in values.flatten(0, -2).split(_OUTPUTS))


def _weighted(x_RN: Tensor, targets: Sequence[Tensor], weight_R: Tensor, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return inputs, with the constant if there is one, and targets (K, R, D), times the weights' square roots."""
    wide = torch.promote_types(x_RN.dtype, torch.float32)
    root_R1 = weight_R.to(wide).sqrt()[:, None]
    x_RN = x_RN.to(wide) * root_R1
    if has_bias:
        x_RN = torch.cat([x_RN, root_R1], dim=1)
    return x_RN, torch.stack([target.to(wide) * root_R1 for target in targets])


def _add_gram(total_NN: Tensor, x_RN: Tensor) -> None:
    """Add xᵀx; what lies below a few diagonal blocks is mirrored rather than computed."""
    width = x_RN.shape[1]
    step = max(1, -(-width // _BLOCKS))
    for start in range(0, width, step):
        rows, right = slice(start, start + step), slice(start + step, width)
        for place, part in enumerate((x_RN[:, rows].T @ x_RN[:, start:]).split(_OUTPUTS)):
            at = slice(start + place * _OUTPUTS, start + place * _OUTPUTS + len(part))
            part = part.to(total_NN)
            total_NN[at, start:] += part
            total_NN[right, at] += part[:, step:].T
