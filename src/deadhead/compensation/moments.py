"""Weighted second moments of a projection's inputs and of what it should give, gathered batch by batch.

Dimensions: R tokens, N inputs of the projection (and a constant 1 where it has a bias), D outputs, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-300
# Blocks on the diagonal of a matrix of moments: four save three eighths of its FLOPs.
_BLOCKS = 4


class Moments:
    """Σ w x xᵀ, Σ w y xᵀ and Σ w yᵀy over tokens: all that a least-squares fit, and its error on a text, depend on.

    Products of a batch are float32 at least, their sums float64, so that the memory taken does not grow with the text.

    Args:
        inputs: N without the constant.
        outputs: D.
        targets: K, how many things a projection could be fitted to.
        has_bias: whether inputs end with a constant 1, whose column of the weight is the bias.
        device: where sums lie; the CPU for a device without float64.
    """

    def __init__(self, inputs: int, outputs: int, targets: int, *, has_bias: bool, device: torch.device) -> None:
        self.inputs, self.has_bias = inputs, has_bias
        place = torch.device("cpu") if device.type == "mps" else device
        width = inputs + has_bias
        self.xx_NN = torch.zeros(width, width, dtype=torch.float64, device=place)
        self.yx_KDN = torch.zeros(targets, outputs, width, dtype=torch.float64, device=place)
        self.yy_KK = torch.zeros(targets, targets, dtype=torch.float64, device=place)
        self.tokens = 0

    def add(self, x_RN: Tensor, targets: Sequence[Tensor], weight_R: Tensor) -> None:
        """Add some tokens: inputs (R, N) without the constant, for each target (R, D), and weights (R,)."""
        wide = torch.promote_types(x_RN.dtype, torch.float32)
        root_R1 = weight_R.to(wide).sqrt()[:, None]
        x_RN = x_RN.to(wide) * root_R1
        if self.has_bias:
            x_RN = torch.cat([x_RN, root_R1], dim=1)
        y_KRD = torch.stack([target.to(wide) * root_R1 for target in targets])
        _add_gram(self.xx_NN, x_RN)
        self.yx_KDN += (y_KRD.transpose(1, 2) @ x_RN).to(self.yx_KDN)
        self.yy_KK += torch.einsum("krd,lrd->kl", y_KRD, y_KRD).to(self.yy_KK)
        self.tokens += len(x_RN)

    def errors(self, weights_LDN: Tensor, mixes_ML: Tensor, goal_K: Tensor) -> Tensor:
        """Return Σ w ‖y − W x‖² over Σ w ‖y‖² for mixes W of some weights, (M,).

        Args:
            weights_LDN: float64.
            mixes_ML: how much of each weight is in each W.
            goal_K: how much of each target is in y; shares that sum to 1.
        """
        total = goal_K @ self.yy_KK @ goal_K
        goal_DN = torch.einsum("k,kdn->dn", goal_K, self.yx_KDN)
        across_L = torch.einsum("ldn,dn->l", weights_LDN, goal_DN)
        squares_LL = (weights_LDN @ self.xx_NN).flatten(1) @ weights_LDN.flatten(1).T
        lost_M = total - 2 * mixes_ML @ across_L + ((mixes_ML @ squares_LL) * mixes_ML).sum(-1)
        return lost_M / total.clamp(min=_TINY)

    @property
    def is_finite(self) -> bool:
        """Whether no sum has overflowed."""
        return all(bool(values.isfinite().all()) for values in (self.xx_NN, self.yx_KDN, self.yy_KK))


def _add_gram(total_NN: Tensor, x_RN: Tensor) -> None:
    """Add xᵀx, of which what lies below a few diagonal blocks is not computed, but mirrored."""
    width = x_RN.shape[1]
    step = max(1, -(-width // _BLOCKS))
    for start in range(0, width, step):
        rows, right = slice(start, start + step), slice(start + step, width)
        product = (x_RN[:, rows].T @ x_RN[:, start:]).to(total_NN)
        total_NN[rows, start:] += product
        total_NN[right, rows] += product[:, step:].T
