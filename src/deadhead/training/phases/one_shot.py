"""Units ranked by one look at a trained model: whole plans, and the scores by which gates begin to lean."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from deadhead.attaching import gates_of
from deadhead.data import TokenStream
from deadhead.errors import InputError
from deadhead.measure.criteria import READS_TEXT, score_heads
from deadhead.measure.latency import Latency
from deadhead.modes import best_device, flushing_denormals
from deadhead.plans.kinds import OneShot
from deadhead.plans.plan import HeadPlan
from deadhead.plans.scores import HeadScores
from deadhead.training.phases.choosing import asked_blocks, budget_costs, plan_of_scores
from deadhead.training.phases.segments import segments
from deadhead.training.recipes.recipe import PruneRecipe


def rank(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int = 0,
    first_segment: int = 0,
    latency: Latency | None = None,
) -> HeadPlan:
    """Choose the units that stay by a one-shot criterion; the model is not changed.

    Where the budget is not a share of heads, those go that score least for what they cost.

    Args:
        model: without gates.
        text: `recipe.steps` batches of it are looked at by the criteria that look at text.
        recipe: with a one-shot criterion and a budget.
        seed: of the choice of batches (of a model without segment memory), and of "random".
        first_segment: where in the text to begin, for a model with segment memory.
        latency: of this model on this machine, for a recipe with a speedup; None measures it.

    Raises:
        InputError: the criterion is not a one-shot one, the budget cannot be reached, or the text is too short.
    """
    if not recipe.is_one_shot:
        raise InputError(
            f"The criterion {recipe.criterion} trains gates; use deadhead.training.train with gates attached."
        )
    criterion = cast(OneShot, recipe.criterion)
    scores = score(model, text, recipe, criterion, recipe.steps, seed=seed, first_segment=first_segment)
    found = budget_costs(model, recipe, latency=latency)
    if found is not None:
        scores = scores.over(found[1])
    return plan_of_scores(model, scores, recipe, latency=latency)[0]


def score(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    criterion: OneShot,
    count: int,
    *,
    seed: int,
    first_segment: int,
) -> HeadScores:
    """Score heads by `count` batches of the recipe's size, if the criterion looks at any."""
    batches: Iterable[dict[str, Tensor]] = ()
    if criterion in READS_TEXT:
        dataset = segments(model, text, recipe, rows=recipe.batch_size, first_segment=first_segment)
        in_order = hasattr(model.config, "memory_length")
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            dataset, batch_size=recipe.batch_size, shuffle=not in_order, generator=generator, drop_last=in_order
        )
        batches = islice(loader, count)
    model.to(best_device())  # type: ignore[arg-type]
    gates = gates_of(model)
    with flushing_denormals():
        unit = recipe.unit if gates is None else gates.unit
        blocks = asked_blocks(recipe, model) if gates is None else gates.block_size or False
        return score_heads(model, criterion, batches, unit=unit, blocks=blocks, seed=seed)
