"""What a phase with gates would do, before it does it: its budget on paper, and its memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deadhead.attaching import block_size
from deadhead.layouts import find_layout
from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.measure.latency import Latency
from deadhead.plans.plan import HeadPlan
from deadhead.plans.scores import HeadScores
from deadhead.training.phases.choosing import asked_blocks, budget_length, plan_of_scores
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.memory import TrainingMemory, training_memory


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a phase with gates would do.

    Args:
        length: positions before the token whose FLOPs and cache are counted.
        unit: what a gate of a head opens and closes.
        block_size: hidden units that a gate of a block does; None where blocks have no gates.
        dense: the model as it is.
        least: the model without any unit that has a gate.
        example: a plan that meets the budget by taking the same share of every layer; training chooses otherwise.
            None where λ decides how much goes.
        pruned: the model once it is cut by that plan.
        reached: what that plan reaches of the budget, counted, or for a speedup predicted.
        memory: of training, as the recipe has it.
    """

    length: int
    unit: str
    block_size: int | None
    dense: Cost
    least: Cost
    example: HeadPlan | None
    pruned: Cost | None
    reached: float | None
    memory: TrainingMemory

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        values = {name: getattr(self, name) for name in ("length", "unit", "block_size", "reached")}
        costs = {name: asdict(cost) for name in ("dense", "least", "pruned") if (cost := getattr(self, name))}
        plan = None if self.example is None else self.example.to_dict()
        return {**values, **costs, "example": plan, "memory": asdict(self.memory)}


def dry_run(model: PreTrainedModel, recipe: PruneRecipe, *, latency: Latency | None = None) -> DryRun:
    """Return what a phase with gates would do to a model.

    Args:
        model: without gates, on any device; without weights on the meta device.
        recipe: the phase.
        latency: of this model on this machine, which a speedup needs.

    Raises:
        UnsupportedModel: it has no head that could be pruned.
        InputError: the budget cannot be reached, or settings do not go together.
    """
    layout = find_layout(model)
    unit = layout.choose_unit(model, recipe.unit, what="heads are cut by")
    size = block_size(layout, model, asked_blocks(recipe, model))
    units = {site.key: site.units for site in layout.all_sites(model, unit, size)}
    total = {site.key: site.total for site in layout.all_sites(model, unit, size)}
    length = budget_length(model, recipe)
    nothing = HeadPlan.of_units(dict.fromkeys(units, ()), total, unit=unit, block_size=size)
    example, found = None, None
    if recipe.budget is not None:
        scores = HeadScores(
            scores={key: _evenly(len(there)) for key, there in units.items()},
            heads=units,
            total=total,
            unit=unit,
            block_size=size,
        )
        example, share = plan_of_scores(model, scores, recipe, latency=latency, predicted=True)
        found = recipe.budget.reached(share)
    return DryRun(
        length=length,
        unit=unit,
        block_size=size,
        dense=model_cost(model, length=length, unit=unit),
        least=model_cost(model, nothing, length=length, unit=unit),
        example=example,
        pruned=None if example is None else model_cost(model, example, length=length, unit=unit),
        reached=found,
        memory=training_memory(model, recipe),
    )


def _evenly(count: int) -> torch.Tensor:
    """Return scores by which layers lose their units in turn, the last first."""
    return -(torch.arange(count) + 0.5) / max(count, 1)
