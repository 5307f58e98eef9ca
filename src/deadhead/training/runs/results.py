"""The result of a phase: the model, and its measurements before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.compensation.record import Compensation
from deadhead.gates.gates import HeadGates
from deadhead.measure.costs import Cost
from deadhead.measure.evaluation import Evaluation
from deadhead.plans.plan import HeadPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Change(Generic[T]):
    """A value before and after a phase."""

    before: T
    after: T


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model after a phase.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer, if it is known.
        plan: the units of the dense model that the model has; None for a model that was never cut.
        costs: parameters, FLOPs and cache, before and after.
        measured: results on the validation text, before and after; None without one.
        steps: steps of the optimizer.
        rolled_back: how training rolled back after a loss that was not finite, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: HeadPlan | None
    costs: Change[Cost]
    measured: Change[Evaluation] | None
    steps: int
    rolled_back: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain JSON values."""
        after = None if self.measured is None else self.measured.after
        found = measured_values(self.costs.after, after, steps=self.steps)
        found.pop("tokens_per_second", None)
        if self.plan is not None and self.plan.hidden_units is not None:
            found["hidden_units"] = self.plan.hidden_units.counts
        if self.rolled_back is not None:
            found["rolled_back"] = self.rolled_back
        return found


@dataclass(frozen=True, kw_only=True)
class Pruned(Trained):
    """A model after units were chosen and, unless the gates are kept, cut.

    Args:
        plan: the units that stay.
        budget: its `kind`, and the values `asked` for and `reached`; None if λ decided.
        gates: the gates on the model, if it was not cut; the costs are then those of the whole model.
        compensation: what was fitted after the cut; None if nothing was tried.
        unrecovered: results on the validation text after the cut and before the recovery; None without a recovery.
    """

    plan: HeadPlan
    budget: dict[str, Any] | None = None
    gates: HeadGates | None = None
    compensation: Compensation | None = None
    unrecovered: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain JSON values."""
        found = super().to_dict()
        if self.gates is not None:
            found["heads"] = self.plan.heads
        if self.compensation is not None:
            found["compensation"] = self.compensation.to_dict()
        if self.unrecovered is not None:
            found["unrecovered_perplexity"] = self.unrecovered.perplexity
        return found if self.budget is None else {**found, "budget": self.budget}


def measured_values(cost: Cost, measured: Evaluation | None, *, steps: int) -> dict[str, Any]:
    """Return the measurements of a model in a run's summary and a phase's result, as plain JSON values."""
    values = {"heads": cost.heads, "parameters": cost.parameters, "flops_per_token": cost.flops_per_token}
    if measured is not None:
        names = ("perplexity", "word_perplexity", "bits_per_byte", "tokens_per_second")
        values |= {name: getattr(measured, name) for name in names}
    return values | {"steps": steps}
