"""The sparsity loss: L0 plain or weighted by output difference, its warm-up, and a λ steered to a target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from deadhead.errors import InputError
from deadhead.gates import HeadGates, l0_probability

Weighting = Literal["plain", "output_difference"]


def difference_weights(difference_H: Tensor) -> Tensor:
    """Return the weights w of a layer's heads in the sparsity loss, shape (H,), mean 1.

    w falls as exp(−d / mean d) with the relative output difference d: a head whose removal hardly changes its layer's
    output is pushed up to e times as hard as an average one. Bounded on purpose: with 1 / d a single dead head
    would take the whole layer's share.
    """
    mean = difference_H.mean()
    if not mean > 0:
        return torch.ones_like(difference_H)
    weights_H = torch.exp(-difference_H / mean)
    return weights_H / weights_H.mean()


def l0_loss(gates: HeadGates, weighting: Weighting = "plain") -> Tensor:
    """Return Σ w P(z > 0) over all heads (paper, the L0 term), with gradient (0-dimensional)."""
    if weighting == "plain" or not len(gates):
        return gates.l0()
    return torch.stack(
        [(difference_weights(gate.difference) * l0_probability(gate.log_alpha, gate.config)).sum() for _, gate in gates]
    ).sum()


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Return the share of λ in force at `step` (counted from 0): a straight line from 0 to 1 (paper, warm-up)."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


class SparsityTarget:
    """Steers λ so that the share of closed heads follows a straight ramp to a target.

    Closing takes a gate many steps, so a controller that looks at the share closed now acts too late and closes
    everything at once. This one looks `horizon` steps ahead: it extends each gate's recent speed, softly counts the
    gates that will then be closed, and moves λ up or down by a factor.

    Args:
        sparsity: share of the gates to close, in [0, 1).
        ramp_steps: steps until the ramp has reached it.
        initial: λ at the start.
        horizon: how many steps ahead the share is predicted.
        gain: how strongly λ reacts to the predicted difference.
    """

    def __init__(
        self, sparsity: float, *, ramp_steps: int, initial: float, horizon: int = 50, gain: float = 0.2
    ) -> None:
        if not 0 <= sparsity < 1:
            raise InputError(f"The target sparsity must be at least 0 and below 1, but it is {sparsity}.")
        self.sparsity = sparsity
        self.ramp_steps = ramp_steps
        self.horizon = horizon
        self.gain = gain
        self.bounds = (initial / 100, initial * 100)
        self.l0 = initial
        self.speed: list[float] = []
        self.previous: list[float] = []

    def update(self, step: int, log_alpha: Iterable[Tensor]) -> float:
        """Take the gates' parameters after `step` (counted from 1); return λ for the next step."""
        values = torch.cat([values_H.flatten() for values_H in log_alpha])
        previous = torch.tensor(self.previous) if self.previous else values
        speed = torch.tensor(self.speed) if self.speed else torch.zeros_like(values)
        speed = 0.9 * speed + 0.1 * (values - previous)
        ahead = values + self.horizon * speed
        predicted = torch.sigmoid(-ahead / 0.25).mean().item()
        wanted = self.sparsity * linear_warmup(step + self.horizon, self.ramp_steps)
        low, high = self.bounds
        self.l0 = min(max(self.l0 * math.exp(self.gain * (wanted - predicted)), low), high)
        self.previous, self.speed = values.tolist(), speed.tolist()
        return self.l0

    def state(self) -> dict[str, Any]:
        """Return what must be saved to go on exactly here."""
        return {"l0": self.l0, "speed": self.speed, "previous": self.previous}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.l0, self.speed, self.previous = state["l0"], state["speed"], state["previous"]


def add_penalty_gradient(gates: HeadGates, strength: float, weighting: Weighting = "plain") -> float:
    """Add λ · ∂L0 / ∂gate to the gates' gradients and return the unweighted L0.

    The penalty does not depend on the batch, so its gradient is added once for each optimizer step, after clipping,
    and the reported loss stays the language model's own. `torch.autograd.grad` leaves hooks of data parallelism alone.
    """
    parameters = [gate.log_alpha_bias for _, gate in gates]
    if not parameters:
        return 0.0
    gradients = torch.autograd.grad(l0_loss(gates, weighting) * strength, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    with torch.no_grad():
        return float(gates.l0())
