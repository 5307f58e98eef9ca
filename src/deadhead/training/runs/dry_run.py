"""A forecast of a phase with gates: its budget on paper, and roughly the memory that it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.measure.latency import Latency
from deadhead.plans.plan import HeadPlan
from deadhead.training.phases.choosing import asked_choices, budget_length, even_plan, reached
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.training_memory import TrainingMemory, training_memory


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a phase with gates would do.

    Args:
        length: positions before the token whose FLOPs and cache are counted.
        unit: the unit that a gate of heads opens and closes.
        block_size: the most hidden units that one gate opens and closes; None if hidden units have no gates.
        costs: costs of the model as it is ("dense"), without any unit that has a gate ("least"), and cut by the
            example ("pruned").
        example: a plan that meets the budget by removing the same share from every layer; training chooses another.
            None if λ decides how much is removed.
        reached: the value of the budget that the example reaches, counted, or predicted for a speedup.
        memory: memory of training by the recipe, in bytes; None if units are ranked and nothing is trained.
    """

    length: int
    unit: str
    block_size: int | None
    costs: dict[str, Cost]
    example: HeadPlan | None
    reached: float | None
    memory: TrainingMemory | None

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain JSON values."""
        values = {name: getattr(self, name) for name in ("length", "unit", "block_size", "reached")}
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        plan = None if self.example is None else self.example.to_dict()
        return {**values, **costs, "example": plan, "memory": self.memory and asdict(self.memory)}


def dry_run(model: PreTrainedModel, recipe: PruneRecipe, *, latency: Latency | None = None) -> DryRun:
    """Return what a phase with gates would do to a model without gates, which may be on the meta device.

    A speedup needs the model's latency on this machine. A budget that cannot be reached is refused.
    """
    choices = asked_choices(model, recipe)
    unit = choices.unit
    length = budget_length(model, recipe)
    nothing = choices.plan(dict.fromkeys(choices.members, ()))
    plans: dict[str, HeadPlan | None] = {"dense": None, "least": nothing}
    found = None
    if recipe.budget is not None:
        plans["pruned"], share = even_plan(model, choices, recipe, latency=latency)
        found = reached(model, recipe, share)
    return DryRun(
        length=length,
        unit=unit,
        block_size=max((len(block) for found in choices.hidden.values() for block in found), default=None),
        costs={name: model_cost(model, plan, length=length, unit=unit) for name, plan in plans.items()},
        example=plans.get("pruned"),
        reached=found,
        memory=None if recipe.is_ranked else training_memory(model, recipe),
    )
