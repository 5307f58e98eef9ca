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

# The rate of a short phase, and how far in all a gate with gradients of typical size may move in a longer one.
_HIGHEST_RATE, _WAY = 0.3, 45.0


def default_rate(steps: int) -> float:
    """Return the gates' learning rate for a phase of `steps` steps: long phases take more and smaller steps."""
    return min(_HIGHEST_RATE, _WAY / max(steps, 1))


class GateOptimizer:
    """Gradient descent with momentum for all gates of a model, at a rate divided by one number for all gates.

    With g_h the gradient of the loss with respect to log_alpha of head h, and p_h that of the sparsity loss,

        m_h ← 0.9 m_h + 0.1 g_h,   v ← 0.99 v + 0.01 mean_h g_h²,   log_alpha_h ← log_alpha_h − η (m_h + p_h) / √v,

    where m and v are corrected for the bias of their first steps, and log_alpha stays within ± `GateConfig.bound`.

    Adam would divide each gate's gradient by that gate's own noise. A head that matters much and one that matters
    little would then move alike, and λ would act against noise. Here gradients are divided by one number, so they keep
    their proportions: a gate comes to rest where the worth of its head about balances λ, which is in nats a token,
    at any state of the training. ("About", because the straight-through gradient is 0.5 to 2.4 times as steep as that
    of the expected loss, and clipping makes it smaller.)

    Args:
        gates: the gates that learn; the model's own optimizer does not see their gradients.
        lr: η, how far log_alpha moves in a step if its head's gradient has mean size.
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
        """Move all gates and clear their gradients; `penalty` is the sparsity loss's gradient, (H,) by layer."""
        gradients = []
        for _, gate in self.gates:
            parameter = gate.log_alpha_bias
            gradient = torch.zeros_like(gate.stored) if parameter.grad is None else whole(parameter.grad)
            # The stored parameter is log_alpha / lr_scale.
            gradients.append(gradient.float() / gate.config.lr_scale)
            # FSDP2's checkpoints need a state of every parameter in the model's own optimizer. A gradient of 0 makes
            # one, and `hold` undoes what that optimizer nevertheless does to the gates.
            parameter.grad = torch.zeros_like(parameter) if is_sharded(parameter) else None
        if not gradients:
            return
        square = float(torch.cat([gradient.cpu() for gradient in gradients]).square().mean())
        # Also in a step that is skipped, in which nothing moves.
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
        """Undo what the model's own optimizer did to gates that FSDP2 shards, such as weight decay."""
        for gate, values in self._moved:
            gate.set_stored(values)
        self._moved = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON values that keep every bit."""
        return {"steps": self.steps, "square": self.square, "means": [mean.tolist() for mean in self.means]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.steps, self.square = state["steps"], state["square"]
        self.means = [torch.tensor(mean) for mean in state["means"]]
