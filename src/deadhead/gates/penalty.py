"""The sparsity loss (plain L0, or weighted by output difference), its warm-up, and a target for the closed share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deadhead.errors import InputError, typed
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import l0_probability
from deadhead.gates.head_gate import HeadGate
from deadhead.plans.kinds import Ranking
from deadhead.plans.plan import HeadPlan

Weighting = Literal["plain", "output_difference"]

# After 40 halvings the interval that contains the shift is narrower than float32 resolves.
_HALVINGS = 40
# The least share of the gates that a target keeps open, and closed, in expectation.
_LEAST = 0.02


def difference_weights(difference_H: Tensor) -> Tensor:
    """Return the weights w of a layer's heads in the sparsity loss, shape (H,), mean 1.

    w is proportional to exp(−d / mean d), where d is the relative output difference: a head whose removal hardly
    changes its layer's output is pushed up to e times as hard as an average one. The weight is bounded on purpose: with
    1 / d a single dead head would take the whole layer's share.
    """
    mean = difference_H.mean()
    if not mean > 0:
        return torch.ones_like(difference_H)
    weights_H = torch.exp(-difference_H / mean)
    return weights_H / weights_H.mean()


def unit_weights(gate: HeadGate, weighting: Weighting) -> Tensor:
    """Return the weights w of a layer's units in the sparsity loss, (H,)."""
    return torch.ones_like(gate.difference) if weighting == "plain" else difference_weights(gate.difference)


def l0_loss(gates: HeadGates, weighting: Weighting = "plain") -> Tensor:
    """Return Σ w P(z > 0) over heads (paper, the L0 term), and blocks times their cost, with gradient (0-dim.)."""
    if weighting == "plain" or not len(gates):
        return gates.l0()
    chances = [unit_weights(gate, weighting) * l0_probability(gate.log_alpha, gate.config) for _, gate in gates]
    return torch.stack([p_H.sum() * gate.cost for p_H, (_, gate) in zip(chances, gates, strict=True)]).sum()


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Return the share of λ that applies at `step` (counted from 0): a straight line from 0 to 1 (paper, warm-up)."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


def steps_within(asked: int | None, steps: int) -> int:
    """Return how many of a training's `steps` a ramp takes: the number asked for, by default two thirds."""
    return max(1, steps * 2 // 3) if asked is None else min(asked, steps)


def require_steps(name: str, steps: int | None) -> None:
    """Raise an InputError, which calls it `name`, if a number of steps is given but negative."""
    if steps is not None and steps < 0:
        raise InputError(f"{name} must be a number of steps that is at least 0, or None, but it is {steps}.")


class Target:
    """A straight ramp from the gates' present share to a given one.

    The ramp takes `ramp_steps`, but at most the steps of the training (see `begin`); None is two thirds of those.
    """

    exact = False

    def __init__(self, share: float, ramp_steps: int | None) -> None:
        require_steps("ramp_steps", ramp_steps)
        self.share = share
        self.asked_steps = ramp_steps
        self.ramp_steps = ramp_steps or 0
        # The share at which the ramp begins.
        self.start: float | None = None

    def begin(self, gates: HeadGates, steps: int) -> None:
        """Begin a ramp at the gates' present share, for a training of `steps` steps."""
        self.ramp_steps = steps_within(self.asked_steps, steps)
        self.start = None

    def plan(self, gates: HeadGates) -> HeadPlan:
        """Return the plan that reaches the target by closing the units with the smallest log_alpha."""
        raise NotImplementedError

    def shortfall(self, gates: HeadGates) -> str:
        """Return a clause on what the gates close in evaluation and how to reach the target, or "" if they do."""
        raise NotImplementedError

    def _first_share(self, gates: HeadGates) -> float:
        raise NotImplementedError

    def wanted(self, step: int, gates: HeadGates) -> float:
        """Return the share that draws should have after `step` steps."""
        if self.start is None:
            self.start = self._first_share(gates)
        return self.start + (self.share - self.start) * linear_warmup(step, self.ramp_steps)

    def prepare(self, gates: HeadGates, step: int) -> None:
        """Do nothing before a step's draws: each gate decides alone."""

    def state(self) -> dict[str, Any]:
        """Return what must be saved to continue exactly here."""
        return {"start": self.start, "ramp_steps": self.ramp_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.start = state["start"]
        # A training that now continues for longer does not reopen closed units.
        self.ramp_steps = min(self.ramp_steps, state.get("ramp_steps", self.ramp_steps))


class SparsityTarget(Target):
    """Holds the expected share of closed heads on a straight ramp to a target.

    A Lagrange multiplier takes the place of a fixed λ: after each step, log_alpha of every head moves by w times one
    number, chosen so that Σ P(open) is on the ramp. So there is no λ to tune, and the language-modelling loss decides
    which heads go.

    Args:
        sparsity: the share, in [0, 1), of the heads' gates to close, and of the blocks' gates if there are any.
        ranking: "global" holds the share over all gates, "layer" in each layer.
        ramp_steps: steps of the ramp; by default two thirds of the training.
        exact: each draw closes exactly the share: the gates with the smallest log_alpha after Gumbel noise. This is
            subset pruning (Li, Cotterell, Sachan 2021).

    Raises:
        InputError: a value is out of range.
    """

    @typed
    def __init__(
        self, sparsity: float, *, ramp_steps: int | None = None, ranking: Ranking = "global", exact: bool = False
    ) -> None:
        if not 0 <= sparsity < 1:
            raise InputError(f"The target sparsity must be at least 0 and below 1, but it is {sparsity}.")
        super().__init__(sparsity, ramp_steps)
        self.ranking: Ranking = ranking
        self.exact = exact

    def plan(self, gates: HeadGates) -> HeadPlan:
        """Return the plan that closes the share, of all gates or of each layer's."""
        return gates.plan(sparsity=self.share, ranking=self.ranking)

    def shortfall(self, gates: HeadGates) -> str:
        """Return a clause that compares the share closed with the one asked for, or "" if they are equal."""
        if gates.plan() == self.plan(gates):
            return ""
        blocks = f" and {gates.block_sparsity:.3g} of the blocks" if gates.choices.has_blocks else ""
        ranking = "" if self.ranking == "global" else ', ranking="layer"'
        return (
            f"close {gates.sparsity:.3g} of the heads{blocks}, but {self.share:g} was asked for; "
            f"gates.plan(sparsity={self.share:g}{ranking}) closes that"
        )

    def _first_share(self, gates: HeadGates) -> float:
        if self.exact:
            return 0.0
        open_now = torch.cat([p_H for key, p_H in gates.open_probability().items() if key.kind == "head"])
        return min(1.0 - float(open_now.mean()), self.share)

    def prepare(self, gates: HeadGates, step: int) -> None:
        """Set how many gates the draws of `step` (counted from 0) open."""
        if self.exact and len(gates):
            share = self.wanted(step + 1, gates)
            gates.draw_exactly([(group, _count(group, share)) for group in self._groups(gates)])

    @torch.no_grad()
    def project(self, gates: HeadGates, step: int, weighting: Weighting = "plain", *, is_last: bool = False) -> None:
        """Move all log_alpha after step number `step` (counted from 1), so that the expected share is on the ramp.

        Exact draws depend only on differences of log_alpha, so with `exact` its mean is held, which keeps gates away
        from their bound. After the last step evaluation, too, closes exactly the share.
        """
        if not len(gates):
            return
        share = self.wanted(step, gates)
        for group in self._groups(gates):
            values = torch.cat([gate.log_alpha for gate in group])
            if self.exact:
                moved = _split_at(values, _count(group, share), group[0]) if is_last else values - values.mean()
            else:
                weights = torch.cat([unit_weights(gate, weighting) for gate in group])
                moved = _moved_to(values, weights, (1 - share) * sum(gate.num_heads for gate in group), group[0])
            for gate, part in zip(group, moved.split([gate.num_heads for gate in group]), strict=True):
                gate.set_log_alpha(part)
        if is_last:
            gates.settle(self.plan(gates))

    def _groups(self, gates: HeadGates) -> list[list[HeadGate]]:
        if self.ranking == "layer":
            return [[gate] for _, gate in gates]
        kinds = [[gate for key, gate in gates if key.kind == kind] for kind in ("head", "block")]
        return [gates_of_kind for gates_of_kind in kinds if gates_of_kind]


def _count(group: Sequence[HeadGate], share: float) -> int:
    total = sum(gate.num_heads for gate in group)
    return total - round(share * total)


def _moved_to(values: Tensor, weights: Tensor, count: float, gate: HeadGate) -> Tensor:
    """Return values + μ · weights, with μ such that `count` gates are open in expectation."""
    offset, bound = gate.config.beta * gate.config.open_threshold, gate.config.bound
    # Beyond these shares all gates would end at their bound, and be equal.
    count = min(max(count, _LEAST * len(values)), (1 - _LEAST) * len(values))

    def moved(shift: float) -> Tensor:
        return (values + shift * weights).clamp(-bound, bound)

    low, high = -8 * bound, 8 * bound
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_above = float(torch.sigmoid(moved(middle) - offset).sum()) > count
        low, high = (low, middle) if is_above else (middle, high)
    return moved((low + high) / 2)


def _split_at(values: Tensor, count: int, gate: HeadGate) -> Tensor:
    """Return the values, moved so that evaluation opens the `count` largest and, except for ties, no others."""
    ordered = values.sort(descending=True).values
    ordered = torch.cat([ordered[:1] + 2, ordered, ordered[-1:] - 2])
    return values - (ordered[count] + ordered[min(count, len(values)) + 1]) / 2 + gate.config.open_threshold


def penalty_gradient(gates: HeadGates, strength: float, weighting: Weighting = "plain") -> list[Tensor]:
    """Return λ · ∂L0 / ∂gate of every layer, with respect to the parameter as it is stored.

    The penalty does not depend on the batch, so its gradient is added once for each optimizer step, after clipping,
    and the reported loss is the language model's alone. `torch.autograd.grad` does not run data parallelism's hooks.
    """
    parameters = [gate.stored for _, gate in gates]
    return list(torch.autograd.grad(l0_loss(gates, weighting) * strength, parameters)) if parameters else []
