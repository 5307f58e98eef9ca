"""The gates' own optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deadhead.gates.gates import HeadGates
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.sharding import is_sharded, whole

# The rate of a short phase, and how far a gate with gradients of typical size may move in all in a longer one.
_HIGHEST_RATE, _WAY = 0.3, 45.0


def default_rate(steps: int) -> float:
    """Return the gates' rate for a phase of so many steps: long ones decide by more, and so by quieter, steps."""
    return min(_HIGHEST_RATE, _WAY / max(steps, 1))


class GateOptimizer:
    """Gradient descent with momentum for all gates of a model, at a rate that one number for all of them divides.

    With g_h the gradient by log_alpha of head h and p_h that of the sparsity loss,

        m_h ← 0.9 m_h + 0.1 g_h,   v ← 0.99 v + 0.01 mean_h g_h²,   log_alpha_h ← log_alpha_h − η (m_h + p_h) / √v,

    m and v without the bias of their first steps, log_alpha within ± `GateConfig.bound`.

    Adam would divide each gate's gradient by that gate's own noise: then a head that matters much and one that
    matters little move alike, and λ works against noise. Divided by one number, gradients keep their proportions: a
    gate comes to rest where what its head is worth about balances λ, which is in nats a token, whatever the state of
    training. (About: the straight-through gradient is 0.5 to 2.4 times as steep as the loss's in expectation, and
    clipping makes it smaller.)

    Args:
        gates: what learns; their gradients are taken away from the model's own optimizer.
        lr: η, how far log_alpha of a head with a gradient of mean size moves in a step.
    """

    momentum = 0.9
    smoothing = 0.99

    def __init__(self, gates: HeadGates, lr: float) -> None:
        self.gates = gates
        self.lr = lr
        self.steps = 0
        self.square = 0.0
        self.means = [torch.zeros(gate.num_heads) for _, gate in gates]
        self._moved: list[tuple[HeadGate, Tensor]] = []

    @torch.no_grad()
    def step(self, penalty: Sequence[Tensor]) -> None:
        """Move all gates, and leave none of their gradients; `penalty` is that of the sparsity loss, (H,) by layer."""
        gradients = []
        for _, gate in self.gates:
            parameter = gate.log_alpha_bias
            gradient = torch.zeros_like(gate.stored) if parameter.grad is None else whole(parameter.grad)
            # The stored parameter is log_alpha / lr_scale.
            gradients.append(gradient.float() / gate.config.lr_scale)
            # FSDP2's checkpoints want a state of every parameter in the model's own optimizer: it gets one there by a
            # gradient of 0, and what it does to the gates all the same `hold` undoes.
            parameter.grad = torch.zeros_like(parameter) if is_sharded(parameter) else None
        if not gradients:
            return
        square = float(torch.cat([gradient.cpu() for gradient in gradients]).square().mean())
        # Also where nothing moves, in a step that is left out.
        self._moved = [
            (gate, gate.stored.detach().clone()) for _, gate in self.gates if is_sharded(gate.log_alpha_bias)
        ]
        if not math.isfinite(square):
            # An overflow under a loss scaler, which leaves out this step of the weights too.
            return
        self.steps += 1
        self.square = self.smoothing * self.square + (1 - self.smoothing) * square
        typical = (self.square / (1 - self.smoothing**self.steps)) ** 0.5
        unbiased = 1 - self.momentum**self.steps
        for index, ((_, gate), gradient, push) in enumerate(zip(self.gates, gradients, penalty, strict=True)):
            mean = self.means[index].to(gradient.device).lerp(gradient, 1 - self.momentum)
            self.means[index] = mean
            if typical:
                moved = gate.log_alpha - self.lr * (mean / unbiased + push.float() / gate.config.lr_scale) / typical
                gate.set_log_alpha(moved.clamp(-gate.config.bound, gate.config.bound))
        self._moved = [(gate, gate.stored.detach().clone()) for gate, _ in self._moved]

    def hold(self) -> None:
        """Undo what the model's own optimizer, such as its weight decay, did to gates that FSDP2 shares out."""
        for gate, values in self._moved:
            gate.set_stored(values)
        self._moved = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; JSON keeps every bit."""
        return {"steps": self.steps, "square": self.square, "means": [mean.tolist() for mean in self.means]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.steps, self.square = state["steps"], state["square"]
        self.means = [torch.tensor(mean) for mean in state["means"]]
