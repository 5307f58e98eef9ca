"""What pruning will do, and how long that takes, roughly: what it computes over what this machine does.

Each part of it is worth so many forward passes of the dense model over the tokens that it reads. A forward pass does
not reach the speed of one large product; by how much it falls short, and what parts are worth, was measured on
SmolLM2-135M (docs/llm.md), so expect other models and machines to be off by half.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from deadhead.measure.cost import model_cost
from deadhead.modes import best_device
from deadhead.plans.kinds import READS_TEXT
from deadhead.training.phases.defaults import recovery, segment_length, with_defaults
from deadhead.training.phases.ranking import later
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.self_text import rows_to_write

# Of a large product's speed, what a forward pass reaches.
_EFFICIENCY = 0.65
# What a token is worth, in forward passes: read by a criterion, by one that needs gradients, in a step of sizes, in one
# of training (a teacher reads it once more), in compensation, and written by the model itself, one after the other.
_READ, _WITH_GRADIENTS, _SIZES, _TRAINING, _TEACHER, _FIT, _WRITE = 1.0, 3.0, 2.3, 3.0, 1.0, 2.9, 3.3
_GRADIENTS = ("taylor", "second-order")
_PRODUCT = 1024


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of pruning: what it does, and how many seconds that may take."""

    what: str
    seconds: float


def forecast(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    *,
    recover: int = 0,
    cut: bool = True,
    writes: bool = False,
    budgets: int = 1,
) -> list[Part]:
    """Return the parts of pruning a model, in order; it may be on the meta device.

    Args:
        model: a language model, without gates.
        recipe: with a criterion.
        recover: steps after the cut.
        cut: whether it is cut.
        writes: whether the model writes the text before.
        budgets: how many models are made, from one look at the text; `recipe` has the first of their budgets.
    """
    written = sum(rows_to_write(model, recipe, recover=recover if cut else 0)) if writes else 0
    recipe = with_defaults(recipe, model)
    length = segment_length(model, recipe)
    pass_seconds = model_cost(model, length=length).flops_per_token / (_EFFICIENCY * speed(model.dtype))

    def part(what: str, rows: float, passes: float) -> Part:
        return Part(what=what, seconds=rows * length * passes * pass_seconds)

    rows, each = recipe.steps * recipe.batch_size, f"{recipe.batch_size} × {length} tokens"
    times = "" if budgets == 1 else f", {budgets} times"
    parts = []
    if writes:
        parts = [part(f"write {written} rows of {length} tokens of its own", written, _WRITE)]
    if recipe.criterion == "sizes":
        further = (budgets - 1) * later(recipe.steps)
        what = f"learn the sizes of layers' parts in {recipe.steps + further} steps of {each}"
        parts.append(part(what, rows, _READ + _SIZES * (1 + further / recipe.steps)))
    elif recipe.is_ranked:
        passes = _WITH_GRADIENTS if recipe.criterion in _GRADIENTS else _READ
        reads = recipe.criterion in READS_TEXT
        of_text = f" from {recipe.steps} batches of {each}" if reads else ""
        parts.append(part(f"rank units by {recipe.criterion}{of_text}", rows, passes * reads))
    else:
        what = "train gates alone" if recipe.freeze_weights else "train gates and weights"
        parts.append(part(f"{what} in {recipe.steps} steps of {each}", rows, _passes(recipe)))
    if cut and recipe.compensate:
        fitted = f"fit what is left to the dense model on {recipe.compensate_rows} rows{times}"
        parts.append(part(fitted, budgets * recipe.compensate_rows, _FIT))
    if cut and recover:
        phase = recovery(recipe, recover, model)
        rows = budgets * recover * phase.batch_size
        parts.append(part(f"recover in {recover} steps of {each}{times}", rows, _passes(phase)))
    return parts


def _passes(phase: PhaseRecipe) -> float:
    """Return what a token of a training step's batch is worth."""
    return phase.gradient_accumulation * (_TRAINING + _TEACHER * (phase.distill > 0))


def speed(dtype: torch.dtype) -> float:
    """Return the FLOPs a second that this machine reaches in one large product of a precision."""
    device = best_device()
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        (left @ right)[0, 0].item()
        times.append(time.perf_counter() - begun)
    return 2 * _PRODUCT**3 / min(times)
