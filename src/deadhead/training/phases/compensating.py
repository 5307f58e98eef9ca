"""Compensation as a recipe asks for it: the dense model that it keeps, and the rows of text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deadhead.compensation.compensating import compensate_from
from deadhead.compensation.record import Compensation
from deadhead.data import TokenStream
from deadhead.errors import InputError
from deadhead.training.phases.defaults import batches_of, with_defaults
from deadhead.training.processes import Progress, counted, together
from deadhead.training.recipes.recipe import PruneRecipe


@dataclass(frozen=True)
class Compensating:
    """What compensation needs besides the cut model: the dense model and text."""

    dense: PreTrainedModel
    batches: list[dict[str, Tensor]]
    text: str

    def of(self, model: PreTrainedModel, progress: Progress, *, consume: bool = True) -> Compensation:
        """Compensate a cut model, in all processes together; `consume` frees the dense model on the way."""
        self.dense.to(model.device)  # type: ignore[arg-type]
        report = counted(progress, "compensating")
        how: dict[str, Any] = {"text": self.text, "progress": report, "consume": consume}
        return together(lambda shares: compensate_from(model, self.dense, self.batches, **how, shares=shares))


def calibration_of(
    model: PreTrainedModel, text: TokenStream, recipe: PruneRecipe, *, seed: int
) -> list[dict[str, Tensor]]:
    """Return the batches to compensate a model on; none if the recipe, or its default, asks for no compensation.

    Raises:
        InputError: the recipe asks for compensation, but there is no text or too little of it.
    """
    if not with_defaults(recipe, model).compensate:
        return []
    batches: list[dict[str, Tensor]] = []
    if len(text.tokens):
        count = -(-recipe.compensate_rows // recipe.batch_size)
        batches = [*islice(batches_of(model, text, recipe, seed=seed), count)]
    rows = len(batches) if hasattr(model.config, "memory_length") else sum(len(b["input_ids"]) for b in batches)
    if rows < 2 and recipe.compensate:
        raise InputError(
            "compensate fits to one part of a text and is measured on another, but the text has fewer than two rows; "
            "use more text, or leave compensate out."
        )
    return batches if rows >= 2 else []


def dense_copy(model: PreTrainedModel, recipe: PruneRecipe) -> PreTrainedModel:
    """Copy a model that is about to be pruned; the copy shares the weights that the phase does not train."""
    is_trained = not (recipe.is_ranked or recipe.freeze_weights)
    return copy.deepcopy(model, {} if is_trained else {id(parameter): parameter for parameter in model.parameters()})
