"""Which units stay: the gates that a recipe asks for, its budget, and the plan that meets the budget by scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deadhead.attaching import attach, choices_of, has_blocks, unwrapped
from deadhead.cutting import pruned_copy
from deadhead.gates.budget import Budget, plan_within
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import find_layout
from deadhead.measure.cost import cost_of_kind, counted_costs, model_cost
from deadhead.measure.latency import Latency, measure_latency
from deadhead.measure.timing import bench
from deadhead.modes import best_device, moved
from deadhead.plans.blocks import Blocks
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, Unit
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_costs import UnitCosts
from deadhead.training.phases.defaults import row_length, with_defaults
from deadhead.training.processes import Progress, counted, on_main
from deadhead.training.recipes.recipe import PruneRecipe

LATENCY_FILE = "latency.json"

# A model that is so much slower than asked for counts as fast enough: measurements differ by as much.
_SPEED_SLACK = 0.015


def gate_config(recipe: PruneRecipe, model: PreTrainedModel, seed: int = 0) -> GateConfig:
    """Return the constants of the gates that a recipe asks for; those that it leaves open depend on the model."""
    filled = with_defaults(recipe, model)
    assert filled.gate_lr_scale is not None and filled.output_scale is not None
    return GateConfig(
        init=filled.init,
        hard=filled.hard,
        output_scale=filled.output_scale and not filled.is_ranked,
        lr_scale=filled.gate_lr_scale,
        seed=seed,
    )


def asked_blocks(recipe: PruneRecipe, model: PreTrainedModel) -> bool | int:
    """Return the argument `blocks` of `deadhead.attach` for a recipe: none, any, or their size."""
    return (recipe.block_size or True) if with_defaults(recipe, model).blocks else False


def asked_choices(model: PreTrainedModel, recipe: PruneRecipe) -> Choices:
    """Return the units of a model that a recipe lets go or stay; the model may be on the meta device."""
    layout, unit, blocks = find_layout(model), _unit(model, recipe), asked_blocks(recipe, model)
    return choices_of(layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks)), unit, blocks)


def attach_gates(model: PreTrainedModel, recipe: PruneRecipe, seed: int = 0, blocks: Blocks | None = None) -> HeadGates:
    """Attach the gates that a recipe asks for; settings that it leaves open depend on the model.

    Args:
        model: a model without gates.
        recipe: gives the unit, the blocks and the constants of the gates.
        seed: seed of the gates' noise.
        blocks: the hidden units of each gate, if the recipe asks for gates on them; None groups neighbours.

    Raises:
        UnsupportedModel: the model has no head, or no block, that could be pruned.
        InputError: the model has gates already, or the blocks do not fit its layers.
    """
    asked: bool | int | Blocks = asked_blocks(recipe, model)
    if blocks is not None and asked is not False:
        asked = blocks
    return attach(model, config=gate_config(recipe, model, seed), unit=recipe.unit, blocks=asked)


def budget_length(model: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the length of text, in tokens, at which a recipe's budget counts FLOPs, cache and time."""
    if recipe.budget_length is not None:
        return recipe.budget_length
    if hasattr(model.config, "memory_length"):
        return int(model.config.memory_length)
    return row_length(model, recipe)


def measure_budget_latency(
    model: PreTrainedModel, recipe: PruneRecipe, progress: Progress = lambda *_: None
) -> Latency:
    """Measure how a model's time depends on its units, in the way that a recipe's speedup is meant."""
    moved(model, best_device())
    return measure_latency(model, **_measured(model, recipe), progress=counted(progress, "measuring latency"))


def latency_in(folder: Path, model: PreTrainedModel, recipe: PruneRecipe, progress: Progress) -> Latency | None:
    """Return the latency that a recipe's speedup needs: read it from a folder, or measure it and keep it there.

    Return None if the budget is not a speedup.
    """
    if recipe.budget is None or recipe.budget.kind != "speedup":
        return None
    path = folder / LATENCY_FILE
    if not path.exists():
        measure_budget_latency(model, recipe, progress).to_json(path)
    # Read even if just written, so that a run that is resumed sees the same numbers.
    latency = Latency.from_json(path)
    latency.require(moved(model, best_device()), **_measured(model, recipe))
    return latency


def _measured(model: PreTrainedModel, recipe: PruneRecipe) -> dict[str, Any]:
    return {
        "unit": recipe.unit,
        "hidden": asked_blocks(recipe, model) is not False,
        "workload": recipe.budget_workload,
        "batch_size": recipe.budget_batch_size,
        "length": budget_length(model, recipe),
    }


def budget_costs(
    model: PreTrainedModel, recipe: PruneRecipe, *, latency: Latency | None = None
) -> tuple[Budget, UnitCosts] | None:
    """Return a recipe's budget and the costs of a model's units in its terms; a share of heads is not such a budget.

    The model may have gates. A speedup needs the model's latency on this machine; None measures it. A budget that
    cannot be reached is refused.
    """
    budget = recipe.budget
    if budget is None or budget.kind == "sparsity":
        return None
    model = unwrapped(model)
    blocks, unit = asked_blocks(recipe, model), _unit(model, recipe)
    if budget.kind == "speedup":
        latency = latency or measure_budget_latency(model, recipe)
        costs = latency.costs()
    else:
        how: dict[str, Any] = {"length": budget_length(model, recipe), "texts": recipe.budget_batch_size}
        costs = counted_costs(model, budget.kind, unit=unit, hidden=blocks is not False, of=budget.of, **how)
        budget = replace(budget, whole=costs.total) if budget.kind == "memory" else budget
    budget.require_reachable(costs, has_blocks=blocks is not False)
    return budget, costs


def _unit(model: PreTrainedModel, recipe: PruneRecipe) -> Unit:
    return find_layout(model).choose_unit(model, recipe.unit, what="heads are cut by")


def plan_of_scores(
    model: PreTrainedModel,
    scores: HeadScores,
    recipe: PruneRecipe,
    *,
    latency: Latency | None = None,
    predicted: bool = False,
) -> tuple[HeadPlan, float]:
    """Return the plan that keeps the highest-scored units within a recipe's budget, and its share of the cost.

    If nothing is timed, the model may be on any device. A speedup may be predicted by a given latency instead of being
    measured. A budget that cannot be reached is refused.
    """
    assert recipe.budget is not None, "a recipe without budget ranks nothing"
    found = budget_costs(model, recipe, latency=latency)
    if found is None:
        plan = scores.plan(recipe.budget.value, ranking=recipe.ranking)
        return plan, true_share(model, recipe, plan)
    budget, costs = found

    def share_left(plan: HeadPlan) -> float:
        if predicted and budget.kind == "speedup" and latency is not None:
            return 1 / latency.speedup(plan)
        return true_share(model, recipe, plan, total=costs.total)

    slack = _SPEED_SLACK if budget.kind == "speedup" and not predicted else 0.0
    return plan_within(scores, costs, budget.share, share_left, slack=slack)


def true_share(model: PreTrainedModel, recipe: PruneRecipe, plan: HeadPlan, *, total: float | None = None) -> float:
    """Return the share of a model's cost that the cut model has, in a budget's terms, counted exactly or measured.

    `total` is the counted cost of the model, if it is known; None counts it.
    """
    budget = recipe.budget
    assert budget is not None
    model = unwrapped(model)
    length = budget_length(model, recipe)
    if budget.kind == "sparsity":
        # Of the heads that there are.
        present = [len(site.units) for site in find_layout(model).sites(model, _unit(model, recipe))]
        return sum(plan.heads) / max(sum(present), 1)
    if budget.kind == "speedup":
        timings = bench(
            {"dense": pruned_copy(model, None), "pruned": pruned_copy(model, plan)},
            workload=recipe.budget_workload,
            batch_size=recipe.budget_batch_size,
            length=length,
            repeats=15,
        )
        return timings["pruned"].seconds / timings["dense"].seconds
    if total is None:
        found = budget_costs(model, recipe)
        assert found is not None
        total = found[1].total
    cost = model_cost(model, plan, length=length)
    how = {"itemsize": model.dtype.itemsize, "texts": recipe.budget_batch_size}
    return cost_of_kind(cost, budget.kind, budget.of, **how) / total


def reached(model: PreTrainedModel, recipe: PruneRecipe, share: float) -> float:
    """Return the value of a recipe's budget, in its own terms, that a remaining share of the model's cost reaches."""
    budget = recipe.budget
    assert budget is not None
    if budget.kind == "memory" and (found := budget_costs(model, recipe)) is not None:
        budget = found[0]
    return budget.reached(share)


def even_plan(
    model: PreTrainedModel, choices: Choices, recipe: PruneRecipe, *, latency: Latency | None = None
) -> tuple[HeadPlan, float]:
    """Return a plan that meets a recipe's budget by removing the same share from every layer, and what it leaves.

    It is an example of the plan that will be found; it removes the last units of each layer.
    """
    even = {key: -(torch.arange(count) + 0.5) / max(count, 1) for key, count in choices.counts.items()}
    return plan_of_scores(model, HeadScores(scores=even, choices=choices), recipe, latency=latency, predicted=True)


def close_to_budget(
    model: PreTrainedModel, gates: HeadGates, recipe: PruneRecipe, *, latency: Latency | None = None
) -> float | None:
    """Close trained gates, the smallest log_alpha first, until a recipe's budget is met exactly.

    Without this, draws meet the budget in expectation only, and some gates may still be undecided.

    Args:
        model: the model with the gates.
        gates: the trained gates.
        recipe: the recipe that they were trained by.
        latency: as for `budget_costs`.

    Returns:
        The value that the plan reaches, in the budget's own terms, measured or counted; None without a budget.
    """
    budget = recipe.budget
    if budget is None:
        return None

    def choose() -> tuple[HeadPlan, float]:
        plan, share = plan_of_scores(model, gates.scores(), recipe, latency=latency)
        if budget.kind == "speedup":
            # Of several measurements the best was taken; what is reported is another.
            share = true_share(model, recipe, plan)
        return plan, reached(model, recipe, share)

    plan, found = on_main(choose)
    if plan != gates.plan():
        gates.set_plan(plan)
    return found
