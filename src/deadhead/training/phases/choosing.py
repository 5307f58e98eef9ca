"""Which units stay: the gates that a recipe asks for, what its budget means for a model, and the plan that meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deadhead.attaching import attach, block_size, gates_of, unwrapped
from deadhead.cutting import pruned_copy
from deadhead.gates.budget import Budget, BudgetTarget, plan_within
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import find_layout
from deadhead.measure.cost import cost_of_kind, counted_costs, model_cost
from deadhead.measure.evaluation import max_positions
from deadhead.measure.latency import Latency, measure_latency
from deadhead.measure.timing import bench
from deadhead.modes import best_device
from deadhead.plans.plan import HeadPlan, Unit, is_block_key
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_costs import UnitCosts
from deadhead.training.phases.defaults import with_defaults
from deadhead.training.processes import on_main
from deadhead.training.recipes.recipe import PruneRecipe

LATENCY_FILE = "latency.json"

# Tokens of a row of a model without memory, unless the recipe says otherwise.
ROW = 256

# A model that is so much slower than asked for counts as fast enough: measurements differ by as much.
_SPEED_SLACK = 0.015
_TIMED_REPEATS = 15


def gate_config(recipe: PruneRecipe, model: PreTrainedModel, seed: int = 0) -> GateConfig:
    """Return the gates' constants that a recipe asks for; what it leaves open depends on the model."""
    filled = with_defaults(recipe, model)
    assert filled.gate_lr_scale is not None and filled.output_scale is not None
    return GateConfig(
        init=filled.init,
        hard=filled.hard,
        output_scale=filled.output_scale and not filled.is_one_shot,
        lr_scale=filled.gate_lr_scale,
        seed=seed,
    )


def asked_blocks(recipe: PruneRecipe, model: PreTrainedModel) -> bool | int:
    """Return what `deadhead.attach` is to be told of blocks for a recipe: none, any, or their size."""
    return (recipe.block_size or True) if with_defaults(recipe, model).blocks else False


def attach_gates(model: PreTrainedModel, recipe: PruneRecipe, seed: int = 0) -> HeadGates:
    """Attach the gates that a recipe asks for.

    Args:
        model: without gates.
        recipe: unit, blocks and the gates' constants; what it leaves open depends on the model.
        seed: of the gates' noise.

    Raises:
        UnsupportedModel: there is no head that could be pruned, or no block.
        InputError: the model has gates already, or the blocks do not fit its layers.
    """
    return attach(model, config=gate_config(recipe, model, seed), unit=recipe.unit, blocks=asked_blocks(recipe, model))


def budget_length(model: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the length of text at which a recipe's budget counts FLOPs, cache and time."""
    if recipe.budget_length is not None:
        return recipe.budget_length
    if hasattr(model.config, "memory_length"):
        return int(model.config.memory_length)
    return recipe.sequence_length or min(ROW, max_positions(model) or ROW)


def measure_budget_latency(
    model: PreTrainedModel, recipe: PruneRecipe, *, report: Callable[[int, int], None] = lambda done, total: None
) -> Latency:
    """Measure how a model's time depends on its units, in the way that a recipe's speedup is meant."""
    model.to(best_device())  # type: ignore[arg-type]
    return measure_latency(model, **_measured(model, recipe), progress=report)


def latency_in(
    folder: Path,
    model: PreTrainedModel,
    recipe: PruneRecipe,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Latency | None:
    """Return what a recipe's speedup needs to know of a model's time, kept in a folder or measured and kept there now.

    Args:
        folder: with or without a `latency.json`.
        model: without gates.
        recipe: None is returned where its budget is no speedup.
        report: told of what is measured.

    Raises:
        InputError: what is kept there was measured of another model, or in another way.
    """
    if recipe.budget is None or recipe.budget.kind != "speedup":
        return None
    path = folder / LATENCY_FILE
    if not path.exists():
        measure_budget_latency(model, recipe, report=report).to_json(path)
    # Read even if just written, so that a run that is resumed sees the same numbers.
    latency = Latency.from_json(path)
    latency.require(model.to(best_device()), **_measured(model, recipe))  # type: ignore[arg-type]
    return latency


def _measured(model: PreTrainedModel, recipe: PruneRecipe) -> dict[str, Any]:
    return {
        "unit": recipe.unit,
        "blocks": asked_blocks(recipe, model),
        "workload": recipe.budget_workload,
        "batch_size": recipe.budget_batch_size,
        "length": budget_length(model, recipe),
    }


def budget_costs(
    model: PreTrainedModel, recipe: PruneRecipe, *, latency: Latency | None = None
) -> tuple[Budget, UnitCosts] | None:
    """Return a recipe's budget, if it has one that is no share of heads, and what a model's units cost in its terms.

    Args:
        model: with or without gates.
        recipe: it.
        latency: of this model on this machine, for a speedup; None measures it.

    Raises:
        InputError: the budget cannot be reached, or the latency is not of this model.
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
        size = block_size(find_layout(model), model, blocks)
        length = budget_length(model, recipe)
        gates = gates_of(model)
        begun = None if gates is None else {key: len(units) for key, units in gates.heads.items()}
        costs = counted_costs(model, budget.kind, unit=unit, block_size=size, length=length, begun=begun)
    budget.require_reachable(costs, has_blocks=blocks is not False)
    return budget, costs


def _unit(model: PreTrainedModel, recipe: PruneRecipe) -> Unit:
    return find_layout(model).choose_unit(model, recipe.unit, what="heads are cut by")


def budget_target(
    model: PreTrainedModel, recipe: PruneRecipe, *, latency: Latency | None = None
) -> BudgetTarget | None:
    """Return what holds gates at a recipe's budget while they train; None where that is a share of heads, or λ."""
    found = budget_costs(model, recipe, latency=latency)
    if found is None:
        return None
    budget, costs = found
    return BudgetTarget(costs, budget.share, ramp_steps=ramp_steps(recipe))


def ramp_steps(recipe: PruneRecipe) -> int:
    """Return the steps until a recipe's ramp has reached its budget."""
    return recipe.ramp_steps or max(1, recipe.steps * 2 // 3)


def plan_of_scores(
    model: PreTrainedModel,
    scores: HeadScores,
    recipe: PruneRecipe,
    *,
    latency: Latency | None = None,
    predicted: bool = False,
) -> tuple[HeadPlan, float]:
    """Return the plan that keeps the units with the highest scores within a recipe's budget, and its share of the cost.

    Args:
        model: it, with or without gates; where nothing is timed, on any device.
        scores: of its units.
        recipe: with a budget.
        latency: as for `budget_costs`.
        predicted: whether a speedup is what `latency` says, which must be given, rather than measured.

    Raises:
        InputError: the recipe has no budget, or one that cannot be reached.
    """
    budget = recipe.budget
    assert budget is not None, "a recipe without budget ranks nothing"
    found = budget_costs(model, recipe, latency=latency)
    if found is None:
        plan = scores.plan(budget.value, ranking=recipe.ranking)
        return plan, true_share(model, recipe, plan)
    budget, costs = found
    if budget.kind == "speedup" and predicted:
        assert latency is not None, "a prediction needs a latency"
        known = latency
        return plan_within(scores, costs, budget.share, lambda plan: 1 / known.speedup(plan))
    slack = _SPEED_SLACK if budget.kind == "speedup" else 0.0
    return plan_within(
        scores, costs, budget.share, lambda plan: true_share(model, recipe, plan, total=costs.total), slack=slack
    )


def true_share(model: PreTrainedModel, recipe: PruneRecipe, plan: HeadPlan, *, total: float | None = None) -> float:
    """Return what share of the model's cost its cut self has, counted exactly or measured, in a budget's terms.

    Args:
        model: with or without gates.
        recipe: with a budget.
        plan: of its units.
        total: what the model costs, if that is known and counted; None counts it.
    """
    budget = recipe.budget
    assert budget is not None
    model = unwrapped(model)
    length = budget_length(model, recipe)
    if budget.kind == "sparsity":
        return sum(plan.heads) / max(_heads_now(model, recipe), 1)
    if budget.kind == "speedup":
        return _timed_share(model, recipe, plan, length)
    if total is None:
        found = budget_costs(model, recipe)
        assert found is not None
        total = found[1].total
    return cost_of_kind(model_cost(model, plan, length=length), budget.kind) / total


def _heads_now(model: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the number of heads that there are, or were before training cut some."""
    gates = gates_of(model)
    if gates is not None:
        return sum(len(units) for key, units in gates.heads.items() if not is_block_key(key))
    return sum(len(site.units) for site in find_layout(model).sites(model, _unit(model, recipe)))


def _timed_share(model: PreTrainedModel, recipe: PruneRecipe, plan: HeadPlan, length: int) -> float:
    timings = bench(
        {"dense": pruned_copy(model, None), "pruned": pruned_copy(model, plan)},
        workload=recipe.budget_workload,
        batch_size=recipe.budget_batch_size,
        length=length,
        repeats=_TIMED_REPEATS,
    )
    return timings["pruned"].seconds / timings["dense"].seconds


def close_to_budget(
    model: PreTrainedModel, gates: HeadGates, recipe: PruneRecipe, *, latency: Latency | None = None
) -> float | None:
    """Close trained gates, those with the smallest log_alpha, until a recipe's budget is met exactly.

    Draws meet it in expectation; some gates may still be undecided.

    Args:
        model: with the gates.
        gates: trained.
        recipe: what they were trained for.
        latency: as for `budget_costs`.

    Returns:
        What the plan reaches, in the budget's own terms, measured or counted; None for a recipe without budget.
    """
    budget = recipe.budget
    if budget is None:
        return None

    def choose() -> tuple[HeadPlan, float]:
        plan, share = plan_of_scores(model, gates.scores(), recipe, latency=latency)
        if budget.kind == "speedup":
            # Of several measurements the best was taken; what is reported is another.
            share = true_share(model, recipe, plan)
        return plan, budget.reached(share)

    plan, found = on_main(choose)
    if plan != gates.plan():
        gates.set_plan(plan)
    return found


def reached(model: PreTrainedModel, recipe: PruneRecipe, plan: HeadPlan) -> float | None:
    """Return what a plan reaches of a recipe's budget, in the budget's own terms; None without budget."""
    budget = recipe.budget
    return None if budget is None else budget.reached(true_share(model, recipe, plan))
