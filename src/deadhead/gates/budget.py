"""Budgets: how much of a dense model's parameters, FLOPs, cache or time may be left, and the target that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deadhead.errors import InputError, require_fields, typed
from deadhead.gates.gates import HeadGates
from deadhead.gates.penalty import Target, Weighting, unit_weights
from deadhead.plans.kinds import BudgetKind, Of
from deadhead.plans.memory_sizes import size_text
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_costs import UnitCosts

# After 50 halvings the interval that contains the multiplier is narrower than float32 resolves.
_HALVINGS = 50
# The least share of the units' cost that a target keeps, and removes, in expectation; else gates end at their bound.
_LEAST = 0.02
# Units whose measured cost is near zero, by noise, are pushed as if they had this share of the mean cost.
_LEAST_SLOPE = 0.05
# How many plans are tried at most, since a model's true cost may differ from the sum over its layers.
_TRIES = 16


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of the dense model may be left.

    Args:
        kind: what is limited: "params", "flops" (FLOPs of a token), "kv_cache" (bytes of a text's cache), "memory",
            "speedup" (measured) or "sparsity" (of heads).
        value: the share of the dense model's cost that may be left, in (0, 1]. For "sparsity", the share of heads that
            goes, in [0, 1); for "speedup", how many times as fast the model must become, at least 1; for "memory",
            bytes.
        of: for "params" only: "all" for a share of all parameters, "blocks" for a share of those of the Transformer's
            blocks, without embeddings and output layer.
        whole: for "memory" only: bytes that the dense model takes; None if they are not counted yet.

    Raises:
        InputError: the value is out of range.
    """

    kind: BudgetKind
    value: float
    of: Of = "all"
    whole: float | None = None

    def __post_init__(self) -> None:
        require_fields(self, "A budget's ")
        fits, rule = {
            "sparsity": (0 <= self.value < 1, "at least 0 and below 1"),
            "speedup": (1 <= self.value <= 1000, "at least 1"),
            "memory": (self.value > 0, "above 0"),
        }.get(self.kind, (0 < self.value <= 1, "above 0 and at most 1, as a share of the dense model's"))
        if not fits:
            raise InputError(f"A budget of {self.kind} must be {rule}, but it is {self.value}.")
        if self.of == "blocks" and self.kind != "params":
            raise InputError(
                f"Only a budget of params can count the blocks' parameters alone, but this one is of {self.kind}."
            )

    @property
    def words(self) -> dict[str, Any]:
        """The budget as reports show it: its kind, its value, and `of` if that is not "all"."""
        return {"kind": self.kind, "asked": self.value, **({} if self.of == "all" else {"of": self.of})}

    @property
    def share(self) -> float:
        """The share of the dense model's cost that may be left, in (0, 1]."""
        if self.kind == "memory":
            assert self.whole is not None, "what the model takes is counted first"
            return self.value / self.whole
        return {"sparsity": 1.0 - self.value, "speedup": 1.0 / self.value}.get(self.kind, self.value)

    def reached(self, share: float) -> float:
        """Return what a model reaches, in the budget's own terms, if this share of the cost is left."""
        speedup = 1.0 / share if share else math.inf
        found = {"sparsity": 1.0 - share, "speedup": speedup, "memory": share * (self.whole or 0.0)}
        return found.get(self.kind, share)

    def require_reachable(self, costs: UnitCosts, *, has_blocks: bool) -> None:
        """Check that a model without any unit is within the budget; the InputError says what can be reached."""
        least = costs.fixed / costs.total if costs.total else 0.0
        if self.share < least:
            what = "heads and blocks" if has_blocks else "heads"
            hint = "" if has_blocks or self.kind in ("sparsity", "kv_cache") else " (or add blocks)"
            asked, reached = f"{self.value:g}", f"{self.reached(least):.3f}"
            if self.kind == "memory":
                asked, reached = size_text(self.value), size_text(self.reached(least))
            raise InputError(
                f"The budget {self.kind} {asked} cannot be reached: without any {what} the model would be at "
                f"{reached}; ask for less pruning{hint}."
            )
        if self.kind == "memory" and self.share >= 1:
            raise InputError(
                f"The budget memory {size_text(self.value)} leaves nothing to prune: the model takes "
                f"{size_text(self.whole or 0.0)}; set a smaller budget."
            )


class BudgetTarget(Target):
    """Holds the expected cost of the open units on a straight ramp to a budget.

    The sparsity loss is Σ c_u P(open_u), where c_u is the cost of unit u, and its λ is a Lagrange multiplier: after
    each step, log_alpha of every unit u moves by w_u c_u times one number, chosen to put the expected cost on the ramp.
    So the units that are worth least for their cost go; the language-modelling loss decides which those are. After the
    last step, the units that stay open in evaluation cost no more than the budget.

    Args:
        costs: what units cost, with the keys of the gates.
        share: the share of the dense cost to keep, in (0, 1].
        ramp_steps: steps of the ramp; by default two thirds of the training.

    Raises:
        InputError: the share is out of range or cannot be reached.
    """

    @typed
    def __init__(self, costs: UnitCosts, share: float, *, ramp_steps: int | None = None) -> None:
        if not 0 < share <= 1:
            raise InputError(f"The share of the cost to keep must be above 0 and at most 1, but it is {share}.")
        super().__init__(share, ramp_steps)
        self.costs = costs
        if self._limit < costs.fixed:
            raise InputError(
                f"A share of {share:g} of the cost cannot be reached: without any of its units the model would still "
                f"cost {costs.fixed / costs.total:.3g} of it; choose a larger share."
            )

    @property
    def _limit(self) -> float:
        # What rounding may add.
        return self.share * self.costs.total * (1 + 1e-9)

    def begin(self, gates: HeadGates, steps: int) -> None:
        """Begin a ramp at the gates' present cost; InputError if their units are not those of the costs."""
        sizes = {key: len(table) - 1 for key, table in self.costs.tables.items()}
        gated = {key: len(gates.choices.units[key]) for key in gates.gates}
        if any(gated.get(key) != size for key, size in sizes.items()):
            raise InputError(
                f"The budget's costs are of {sum(sizes.values())} units in {len(sizes)} places, but the model's gates "
                f"are on {sum(gated.values())} in {len(gated)}; count costs of the model and the units that have gates."
            )
        super().begin(gates, steps)

    def plan(self, gates: HeadGates) -> HeadPlan:
        """Return the plan that closes units until the others cost at most the share."""
        return gates.scores().within(self.costs, self.share * self.costs.total)

    def shortfall(self, gates: HeadGates) -> str:
        """Return a clause that compares the share left with the one asked for, or "" if it is no larger."""
        sizes = gates.choices.sizes
        cost = self.costs.of(
            {key: float((gates.gates[key].is_open.cpu() * sizes[key]).sum()) for key in self.costs.tables}
        )
        if cost <= self._limit:
            return ""
        return (
            f"leave {cost / self.costs.total:.3g} of the cost, but {self.share:g} was asked for; "
            "callback.target.plan(gates) is within that"
        )

    def expected(self, gates: HeadGates) -> float:
        """Return the expected cost of a training draw."""
        return self.costs.of(self._counts(gates))

    def _first_share(self, gates: HeadGates) -> float:
        return max(self.expected(gates) / self.costs.total, self.share)

    @torch.no_grad()
    def project(self, gates: HeadGates, step: int, weighting: Weighting = "plain", *, is_last: bool = False) -> None:
        """Move all log_alpha after step number `step` (counted from 1), so that the expected cost is on the ramp."""
        held = {key: gates.gates[key] for key in self.costs.tables}
        sizes = [gate.num_heads for gate in held.values()]
        if not sum(sizes):
            return
        values = torch.cat([gate.log_alpha.detach().cpu() for gate in held.values()])
        prices = self._prices(gates)
        weights = torch.cat([unit_weights(gate, weighting).cpu() * prices[key] for key, gate in held.items()])
        moved = self._moved(values, weights, sizes, self.wanted(step, gates), gates)
        for gate, part in zip(held.values(), moved.split(sizes), strict=True):
            gate.set_log_alpha(part.to(gate.log_alpha_bias.device))
        if is_last:
            gates.settle(self.plan(gates))

    def _moved(self, values: Tensor, weights: Tensor, sizes: list[int], share: float, gates: HeadGates) -> Tensor:
        """Return values + μ · weights, with μ such that the expected cost is a share of the dense cost."""
        offset, bound = gates.config.beta * gates.config.open_threshold, gates.config.bound
        variable = self.costs.total - self.costs.fixed
        least, most = self.costs.fixed + _LEAST * variable, self.costs.total - _LEAST * variable
        wanted = min(max(share * self.costs.total, least), most)
        key_of_U = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        size_U = torch.cat([gates.choices.sizes[key] for key in self.costs.tables])

        def moved(shift: float) -> Tensor:
            return (values + shift * weights).clamp(-bound, bound)

        def cost(shift: float) -> float:
            open_U = torch.sigmoid(moved(shift) - offset).double() * size_U
            return self.costs.of_counts(torch.zeros(len(sizes), dtype=torch.float64).index_add(0, key_of_U, open_U))

        positive = weights[weights > 0]
        high = 2 * bound / float(positive.min()) if len(positive) else 0.0
        low = -high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(middle) > wanted else (middle, high)
        return moved((low + high) / 2)

    def _prices(self, gates: HeadGates) -> dict[UnitKey, Tensor]:
        """Return the cost of each gate's units at the expected counts, (H,) by key, scaled to a mean of 1."""
        slopes, sizes = self.costs.slopes(self._counts(gates)), gates.choices.sizes
        variable = self.costs.total - self.costs.fixed
        mean = variable / max(sum(len(sizes[key]) for key in slopes), 1)
        if not mean > 0:
            return {key: torch.zeros(len(sizes[key])) for key in slopes}
        found = {
            # Units that cost nothing at all are not pushed: hidden units need no cache, for example.
            key: (sizes[key] * slope / mean).clamp(min=_LEAST_SLOPE) * (float(self.costs.tables[key][-1]) > 0)
            for key, slope in slopes.items()
        }
        average = float(torch.cat([*found.values()]).mean())
        return {key: (price_H / (average or 1.0)).float() for key, price_H in found.items()}

    def _counts(self, gates: HeadGates) -> dict[UnitKey, float]:
        sizes = gates.choices.sizes
        return {key: float((gates.gates[key].open_probability.cpu() * sizes[key]).sum()) for key in self.costs.tables}


def plan_within(
    scores: HeadScores, costs: UnitCosts, share: float, true_share: Callable[[HeadPlan], float], *, slack: float = 0.0
) -> tuple[HeadPlan, float]:
    """Return the plan that keeps the units with the highest scores within a share of the dense cost.

    Args:
        scores: the units' scores.
        costs: what units cost.
        share: of the dense cost.
        true_share: returns the true share for a plan. It may differ from the sum of `costs`: a module may lose more
            than its units, and times do not add up exactly.
        slack: how far the true share may exceed `share`, as a share of it.

    Returns:
        The plan and its model's true share; those of the last try if none is within the budget.
    """
    known: dict[HeadPlan, float] = {}
    allowed, low, high = share, costs.fixed / costs.total, 1.0
    best: HeadPlan | None = None
    for _ in range(_TRIES):
        plan = scores.within(costs, allowed * costs.total)
        if plan not in known:
            known[plan] = true_share(plan)
        found = known[plan]
        if found <= share * (1 + slack) + 1e-12:
            if best is None or found > known[best]:
                best = plan
            counts = {key: len(units) for key, units in plan.units.items() if key in costs.tables}
            # A measured share is not approached further: the clock varies by more than the difference.
            if slack or abs(found - costs.of(counts) / costs.total) < 1e-6:
                break
            low = allowed
        else:
            high = allowed
        # Step by the difference at first, then halve the interval between too little and too much.
        step = allowed + share - found
        allowed = step if low < step < high and len(known) <= 2 else (low + high) / 2
    best = plan if best is None else best
    return best, known[best]
