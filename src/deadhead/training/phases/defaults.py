"""Defaults that depend on the model: rates, scales, blocks, and the rows of text that a phase reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from deadhead.data import RowDataset, SegmentDataset, TokenStream
from deadhead.errors import InputError
from deadhead.layouts import find_layout
from deadhead.measure.positions import max_positions
from deadhead.models import OWN_TYPES, AllAttentionConfig
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import GATES_ONLY, PhaseRecipe, PruneRecipe

# log_alpha's learning rate where the model's own is too small for gates to close in a short phase.
_GATE_RATE = 0.02

# The share of a recovery's steps in which the learning rate rises, and the rate it rises to if all weights of a
# pretrained model learn (docs/llm.md).
_WARMUP, _RECOVERY_RATE = 0.1, 2e-4

# Tokens of a row of a model without memory, unless the recipe says otherwise.
_ROW = 256

_P = TypeVar("_P", bound=PhaseRecipe)


def with_defaults(phase: _P, model: PreTrainedModel) -> _P:
    """Return a phase's recipe with the settings filled in that it leaves to the model.

    Deadhead's own models are trained from scratch, with the paper's output scale. Other models are pretrained: their
    weights take small steps while the gates take normal ones, and the rest of a cut layer is not scaled up.
    """
    ours = model.config.model_type in OWN_TYPES
    rate = phase.learning_rate or (2e-3 if ours else 5e-5)
    filled: dict[str, Any] = {"learning_rate": rate}
    if isinstance(phase, PruneRecipe):
        # With an optimizer of their own the scale would only make clipping see more of the gates' gradients.
        scale = 1.0 if phase.gate_lr != 0 else 10.0 if ours else _GATE_RATE / rate
        filled["gate_lr_scale"] = phase.gate_lr_scale or scale
        filled["output_scale"] = ours if phase.output_scale is None else phase.output_scale
        filled["blocks"] = _has_blocks(phase, model)
        filled["compensate"] = not ours if phase.compensate is None else phase.compensate
    return phase.model_copy(update=filled)


# What only gates need, or weights that learn with them; whoever sets it wants them. Sizes go with no `ranking` either.
_GATES_ONLY = {*GATES_ONLY, "ranking"}
_TRAINING_ONLY = {
    *("learning_rate", "schedule", "warmup_steps", "weight_decay", "lora_rank", "distill", "distill_temperature"),
    *("gradient_accumulation", "gradient_checkpointing", "bf16"),
}


def with_criterion(recipe: PruneRecipe, model: PreTrainedModel, *, recovers: bool = False) -> PruneRecipe:
    """Return a recipe with a criterion, if it leaves that to the model: sizes or gates.

    Args:
        recipe: the recipe of a single phase.
        model: the model of the phase; its weights do not matter.
        recovers: whether the phase trains after the cut; settings for training alone are then meant for that.
    """
    if recipe.criterion is not None:
        return recipe
    of_gates = _GATES_ONLY if recovers else _GATES_ONLY | _TRAINING_ONLY
    is_pretrained = model.config.model_type not in OWN_TYPES and model.can_generate()
    has_costs = recipe.budget is not None and recipe.budget.kind != "sparsity"
    learns_sizes = is_pretrained and has_costs and not of_gates & recipe.model_fields_set
    return changed(recipe, criterion="sizes" if learns_sizes else "gates")


def recovery(recipe: PruneRecipe, steps: int, model: PreTrainedModel) -> PhaseRecipe:
    """Return the recipe of a pruned model's recovery: the settings of the phase, with the defaults of a recovery."""
    is_pretrained = model.config.model_type not in OWN_TYPES
    defaults = {
        "learning_rate": _RECOVERY_RATE if is_pretrained and not recipe.lora_rank else None,
        "schedule": "cosine",
        "warmup_steps": round(_WARMUP * steps),
        "distill": 1.0,
        "distill_temperature": 1.0,
    }
    given = {name: getattr(recipe, name) for name in PhaseRecipe.model_fields if name in recipe.model_fields_set}
    rows = {"batch_size": recipe.batch_size, "steps": steps}
    return PhaseRecipe.model_validate({**defaults, **given, **rows})


def _has_blocks(phase: PruneRecipe, model: PreTrainedModel) -> bool:
    """Return whether blocks get gates: as the recipe says, by default if heads alone would leave most of the cost."""
    if phase.blocks is not None or phase.block_size is not None:
        return phase.blocks is not False
    asked = phase.budget is not None and phase.budget.kind in ("params", "flops", "memory", "speedup")
    has_own_blocks = model.config.model_type != AllAttentionConfig.model_type
    return asked and has_own_blocks and bool(find_layout(model).hidden_sites(model))


def row_length(model: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return the number of tokens in a row of a model without segment memory."""
    return recipe.sequence_length or min(_ROW, max_positions(model) or _ROW)


def segment_length(model: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return the number of tokens in a row; raise InputError if the model cannot read as many."""
    if hasattr(model.config, "memory_length"):
        if recipe.sequence_length not in (None, model.config.segment_length):
            raise InputError(
                f"This model reads segments of {model.config.segment_length} tokens, but got a sequence_length of "
                f"{recipe.sequence_length}; leave it out."
            )
        return int(model.config.segment_length)
    most, length = max_positions(model), row_length(model, recipe)
    if most is not None and length > most:
        raise InputError(f"The model has {most} positions, but got a sequence_length of {length}; use a shorter one.")
    return length


def segments(
    model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, *, rows: int, first_segment: int = 0
) -> Dataset[Any]:
    """Return the data set that a phase reads: rows that continue from batch to batch, or independent rows.

    `rows` is the number of rows in a batch over all processes; `first_segment` is that of `PhaseRun`.
    """
    length = segment_length(model, recipe)
    if hasattr(model.config, "memory_length"):
        if text.scored is not None:
            raise InputError(
                "answers_only is for models without segment memory, but this model reads the whole text in order; "
                "leave it out."
            )
        return SegmentDataset(text.tokens, rows=rows, segment_length=length, first_segment=first_segment)
    # Without memory the rows of a batch need not go on where those of the last one ended.
    return RowDataset(text.tokens, length=length, prefix=text.prefix, scored=text.scored)


def batches_of(
    model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, *, seed: int, first_segment: int = 0
) -> Iterable[dict[str, Tensor]]:
    """Return batches as a phase reads them: in the order of the text for a model with memory, otherwise shuffled."""
    dataset = segments(model, text, recipe, rows=recipe.batch_size, first_segment=first_segment)
    in_order = hasattr(model.config, "memory_length")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_size=recipe.batch_size, shuffle=not in_order, generator=generator, drop_last=in_order
    )
