"""What pruning will do, roughly how long it takes, and how much memory it needs.

Time is the computation divided by the speed of this machine; memory is that of `part_memory.py`.

Each part of pruning costs a number of forward passes of the dense model over the tokens that it reads. A forward pass
does not reach the speed of one large matrix product. How far it falls short, and the cost of each part, were measured
on SmolLM2-135M (docs/llm.md), so estimates for other models and machines may be off by half.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.measure.cost import model_cost
from deadhead.modes import best_device
from deadhead.plans.kinds import READS_TEXT
from deadhead.plans.memory_sizes import size_text
from deadhead.training.phases.defaults import recovery, segment_length, with_defaults
from deadhead.training.phases.ranking import later
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.part_memory import (
    fitting_memory,
    gates_memory,
    pruned_skeleton,
    ranking_memory,
    recovery_memory,
    streamed_fitting_memory,
    streamed_ranking_memory,
    writing_memory,
)
from deadhead.training.runs.self_text import rows_to_write

# The share of a large matrix product's speed that a forward pass reaches.
_EFFICIENCY = 0.65
# The cost of a token, in forward passes: read by a criterion, by one that needs gradients, in a step of sizes, in one
# of training (a teacher reads it once more), in compensation, and written by the model itself, token after token.
_READ, _WITH_GRADIENTS, _SIZES, _TRAINING, _TEACHER, _FIT, _WRITE = 1.0, 3.0, 2.3, 3.0, 1.0, 2.9, 3.3
_GRADIENTS = ("taylor", "second-order")
_PRODUCT = 1024
_STREAMED = "keep one layer of the model in memory at a time (--stream, deadhead.prune_checkpoint)"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of pruning.

    Args:
        what: what the part does.
        seconds: the time that it may take, in seconds.
        memory: the most memory that tensors may hold at any time, in bytes.
        remedy: how to use less memory.
    """

    what: str
    seconds: float
    memory: int
    remedy: str


def forecast(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    *,
    recover: int = 0,
    cut: bool = True,
    writes: bool = False,
    budgets: int = 1,
    streamed: bool = False,
) -> list[Part]:
    """Return the parts of pruning a model, in order; the model may be on the meta device.

    Args:
        model: a language model without gates.
        recipe: a recipe with a criterion.
        recover: steps of training after the cut.
        cut: whether the model is cut.
        writes: whether the model writes the text first.
        budgets: number of models that are made from one pass over the text; `recipe` has the first of their budgets.
        streamed: whether one layer of the model is in memory at a time.
    """
    written = sum(rows_to_write(model, recipe, recover=recover if cut else 0)) if writes else 0
    recipe = with_defaults(recipe, model)
    length = segment_length(model, recipe)
    pass_seconds = model_cost(model, length=length).flops_per_token / (_EFFICIENCY * speed(model.dtype))

    def part(what: str, rows: float, passes: float, memory: int, remedy: str) -> Part:
        seconds = rows * length * passes * pass_seconds
        return Part(what=what, seconds=seconds, memory=memory, remedy=remedy)

    rows, each = recipe.steps * recipe.batch_size, f"{recipe.batch_size} × {length} tokens"
    times = "" if budgets == 1 else f", {budgets} times"
    parts = []
    if writes:
        what, memory = f"write {written} rows of {length} tokens of its own", writing_memory(model, length)
        parts = [part(what, written, _WRITE, memory, "give it a text")]
    if recipe.criterion == "sizes":
        further = (budgets - 1) * later(recipe.steps)
        what = f"learn the sizes of layers' parts in {recipe.steps + further} steps of {each}"
        passes = _READ + _SIZES * (1 + further / recipe.steps)
        parts.append(part(what, rows, passes, ranking_memory(model, recipe), _STREAMED))
    elif recipe.is_ranked:
        passes = _WITH_GRADIENTS if recipe.criterion in _GRADIENTS else _READ
        reads = recipe.criterion in READS_TEXT
        of_text = f" from {recipe.steps} batches of {each}" if reads else ""
        memory = (streamed_ranking_memory if streamed else ranking_memory)(model, recipe)
        remedy = "read fewer batches (steps)" if streamed else _STREAMED
        parts.append(part(f"rank units by {recipe.criterion}{of_text}", rows, passes * reads, memory, remedy))
    else:
        what = "train gates alone" if recipe.freeze_weights else "train gates and weights"
        memory = gates_memory(model, recipe, keeps_dense=cut and (bool(recipe.compensate) or recover > 0))
        parts.append(part(f"{what} in {recipe.steps} steps of {each}", rows, _passes(recipe), memory, _thrift(recipe)))
    pruned = pruned_skeleton(model, recipe) if cut and (recipe.compensate or recover) else model
    if cut and recipe.compensate:
        fitted = f"fit what is left to the dense model on {recipe.compensate_rows} rows{times}"
        memory = (streamed_fitting_memory if streamed else fitting_memory)(model, pruned, recipe)
        remedy = "leave it out, or read fewer compensate_rows" if streamed else f"leave it out, or {_STREAMED}"
        parts.append(part(fitted, budgets * recipe.compensate_rows, _FIT, memory, remedy))
    if cut and recover:
        phase = recovery(recipe, recover, model)
        rows = budgets * recover * phase.batch_size
        what, memory = f"recover in {recover} steps of {each}{times}", recovery_memory(model, pruned, phase)
        parts.append(part(what, rows, _passes(phase), memory, _thrift(phase)))
    return parts


def require_estimated(model: PreTrainedModel) -> None:
    """Check that the memory of pruning a model can be estimated, if it is limited; raise InputError if not."""
    if not model.can_generate():
        raise InputError(
            f"max_memory is for models that predict the next token, whose memory is estimated, but "
            f"{type(model).__name__} does not; leave max_memory out."
        )


def require_memory(parts: Sequence[Part], most: int) -> None:
    """Check that no part of pruning takes more than `most` bytes of memory; raise InputError if one does."""
    for part in parts:
        if part.memory > most:
            raise InputError(
                f"To {part.what} takes about {size_text(part.memory)} of memory, more than the max_memory of "
                f"{size_text(most)}; {part.remedy}."
            )


def _thrift(phase: PhaseRecipe) -> str:
    """Return how to use less memory than training by this recipe."""
    frozen = isinstance(phase, PruneRecipe) and phase.freeze_weights
    ways = [
        *(["gradient_checkpointing"] if not phase.gradient_checkpointing else []),
        *(["a lora_rank"] if not (phase.lora_rank or frozen) else []),
        *(["freeze_weights"] if isinstance(phase, PruneRecipe) and not (phase.lora_rank or frozen) else []),
        "fewer rows at once (batch_size)",
    ]
    return f"give {', or '.join(ways)}"


def _passes(phase: PhaseRecipe) -> float:
    """Return the cost of a training step for each token of its batch, in forward passes of the dense model."""
    return phase.gradient_accumulation * (_TRAINING + _TEACHER * (phase.distill > 0))


def speed(dtype: torch.dtype) -> float:
    """Return the FLOPs a second that this machine reaches in one large matrix product of a precision."""
    device = best_device()
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        (left @ right)[0, 0].item()
        times.append(time.perf_counter() - begun)
    return 2 * _PRODUCT**3 / min(times)
