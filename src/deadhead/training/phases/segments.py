"""What a phase reads of a text: rows that go on where they ended, or rows in any order."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel

from deadhead.data import SegmentDataset, TokenStream
from deadhead.errors import InputError
from deadhead.measure.evaluation import max_positions
from deadhead.training.phases.choosing import ROW
from deadhead.training.recipes.recipe import PhaseRecipe


def segments(
    model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, *, rows: int, first_segment: int
) -> Dataset[Any]:
    """Return what a phase reads of a text.

    Args:
        model: on any device; without weights on the meta device.
        text: it.
        recipe: of the phase.
        rows: that are read side by side, on all processes.
        first_segment: see `PhaseRun`.

    Raises:
        InputError: the text is too short, or the recipe's sequence_length is not one that the model can read.
    """
    has_memory = hasattr(model.config, "memory_length")
    return SegmentDataset(
        text.tokens,
        # Without memory the rows of a batch need not go on where those of the last one ended.
        rows=rows if has_memory else 1,
        segment_length=segment_length(model, recipe),
        first_segment=first_segment if has_memory else 0,
    )


def segment_length(model: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return the tokens of a row.

    Raises:
        InputError: the recipe's sequence_length is not one that the model can read.
    """
    if hasattr(model.config, "memory_length"):
        if recipe.sequence_length not in (None, model.config.segment_length):
            raise InputError(
                f"This model reads segments of {model.config.segment_length} tokens, so a sequence_length of "
                f"{recipe.sequence_length} cannot be had; leave it out."
            )
        return int(model.config.segment_length)
    most = max_positions(model)
    length = recipe.sequence_length or min(ROW, most or ROW)
    if most is not None and length > most:
        raise InputError(f"The model has {most} positions, but a sequence_length of {length} was asked for.")
    return length
