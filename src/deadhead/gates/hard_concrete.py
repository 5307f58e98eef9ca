"""The formulas of hard-concrete gates (Louizos, Welling, Kingma 2018).

With u ~ Uniform(ε, 1 − ε), a gate's value is

    s = σ((ln u − ln(1 − u) + log_alpha) / β)   in training,      s = σ(log_alpha)   in evaluation,
    z = clamp(s (ζ − γ) + γ, 0, 1),             hard: 1[z ≥ 0.5] forward, the gradient of z backward,

and the L0 sparsity loss is the sum of P(z > 0) = σ(log_alpha − β ln(−γ / ζ)) over the heads. Shim et al. 2021 (arXiv
2110.03252) use one such gate for each head, with hard decisions, and scale a layer's output by H / (open gates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deadhead.errors import InputError, require_fields

# The largest value of β, γ, ζ and log_alpha: beyond it σ is 0 or 1 for every draw.
_MOST = 1e3


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The constants that all gates of a model share.

    Args:
        beta: temperature β of the concrete distribution.
        gamma: lower end γ of the stretch, below 0.
        zeta: upper end ζ of the stretch, above 1.
        init: log_alpha of every gate at the start (the paper's initialisation); 0.0 switches the initialisation off.
        hard: True makes forward values 0 or 1 (straight-through gradient); False leaves them soft.
        output_scale: whether to multiply the gated heads' sum by H / (open gates), the paper's attention output
            scaling.
        lr_scale: how many times as fast as the model a gate learns in the model's own optimizer (exact for Adam and
            its like). It has no effect if gates have an optimizer of their own.
        epsilon: ε; noise is drawn from Uniform(ε, 1 − ε).
        seed: seed of the gates' own noise.

    Raises:
        InputError: a value is out of range, or not of its type.
    """

    beta: float = 1 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    init: float = 2.0
    hard: bool = True
    output_scale: bool = False
    lr_scale: float = 10.0
    epsilon: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        require_fields(self)
        for name, value in vars(self).items():
            if hasattr(value, "item"):
                # JSON cannot hold NumPy's numbers.
                object.__setattr__(self, name, value.item())
        for name, wrong, rule in (
            ("beta", not 0 < self.beta <= _MOST, f"above 0 and at most {_MOST:g}"),
            ("gamma", not -_MOST <= self.gamma < 0, f"below 0 and at least {-_MOST:g}"),
            ("zeta", not 1 < self.zeta <= _MOST, f"above 1 and at most {_MOST:g}"),
            ("init", not abs(self.init) <= _MOST, f"at most {_MOST:g} from 0"),
            ("lr_scale", not self.lr_scale > 0, "above 0"),
            # The range that files of gates allow.
            ("seed", not abs(self.seed) < 2**63, "a number of 64 bits"),
            ("epsilon", not 0 < self.epsilon < 0.5, "between 0 and 0.5"),
        ):
            if wrong or not math.isfinite(getattr(self, name)):
                raise InputError(f"A gate's {name} must be {rule}, but it is {getattr(self, name)}.")

    def for_gate(self, *, of_blocks: bool) -> GateConfig:
        """Return the constants of one module's gates: the output scale is for heads, never for blocks."""
        return replace(self, output_scale=False) if of_blocks else self

    @property
    def open_threshold(self) -> float:
        """The log_alpha from which a gate is open in evaluation: z ≥ 0.5 if hard (0 by default), z > 0 if soft."""
        return self._log_alpha_at(0.5 if self.hard else 0.0)

    @property
    def saturation(self) -> float:
        """The |log_alpha| from which a gate's value in evaluation is exactly 0 or 1, for soft gates too."""
        return max(-self._log_alpha_at(0.0), self._log_alpha_at(1.0))

    @property
    def bound(self) -> float:
        """The largest |log_alpha| in training: at −6 a gate still opens in one of 400 draws, so it can come back."""
        return max(6.0, abs(self.init))

    def _log_alpha_at(self, z: float) -> float:
        share = (z - self.gamma) / (self.zeta - self.gamma)
        return math.log(share / (1 - share))


def gate_values(log_alpha: Tensor, config: GateConfig, noise: Tensor | None = None) -> Tensor:
    """Return the gates' values z, in the shape of `log_alpha`; `noise` is u in a training draw, None in evaluation."""
    z = soft_values(log_alpha, config, noise)
    if not config.hard:
        return z
    # In this order rounding errors cancel: the forward value is exactly 0 or 1.
    return z + ((z >= 0.5).to(z.dtype) - z).detach()


def soft_values(log_alpha: Tensor, config: GateConfig, noise: Tensor | None) -> Tensor:
    """Return the values z before they become hard, in the shape of `log_alpha`; arguments as for `gate_values`."""
    logits = log_alpha if noise is None else (noise.log() - (-noise).log1p() + log_alpha) / config.beta
    return (torch.sigmoid(logits) * (config.zeta - config.gamma) + config.gamma).clamp(0.0, 1.0)


def l0_probability(log_alpha: Tensor, config: GateConfig) -> Tensor:
    """Return P(z > 0) of each gate, its term in the L0 sparsity loss, in the shape of `log_alpha`."""
    return torch.sigmoid(log_alpha - config.beta * math.log(-config.gamma / config.zeta))
