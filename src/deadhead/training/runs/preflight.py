"""What only the model or the text shows to be wrong with a recipe, found before hours of training."""

from __future__ import annotations

from transformers import PreTrainedConfig

from deadhead.data import TokenStream
from deadhead.errors import InputError
from deadhead.measure.cost import skeleton
from deadhead.training.phases.choosing import attach_gates, budget_costs
from deadhead.training.phases.learning import learner
from deadhead.training.phases.segments import segments
from deadhead.training.processes import count
from deadhead.training.recipes.recipe import Recipe


def require_fitting(recipe: Recipe, config: PreTrainedConfig, text: TokenStream) -> None:
    """Check that every phase of a run can begin, on the model without its weights.

    A speedup is measured, so whether it can be reached shows only then.

    Args:
        recipe: of the run.
        config: of its model.
        text: that it learns from.

    Raises:
        InputError: the text is too short for a phase, a phase asks for what its model has not, or the budget cannot
            be reached.
    """
    model = skeleton(config)
    for phase in filter(None, (recipe.dense_phase, recipe.prune, recipe.finetune)):
        segments(model, text, phase, rows=phase.batch_size * count(), first_segment=0)
        with learner(model, phase):
            pass
    if recipe.dense_phase is not None and recipe.dense_phase.distill:
        raise InputError(
            "[train] has no teacher yet that it could learn from, as the dense model is what it makes; leave its "
            "distill out."
        )
    attach_gates(model, recipe.prune)
    if recipe.prune.budget is not None and recipe.prune.budget.kind != "speedup":
        budget_costs(model, recipe.prune)
