"""What criteria that look at text share: a model runs over batches, and which positions of a batch count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.measure.losses import Batches, SegmentLoss, SegmentOutputs, require_language_model
from deadhead.modes import evaluating, frozen

Begin = Callable[[Mapping[str, Tensor]], None]


class Reading(Protocol):
    """Runs modules of a language model over a text while others watch them."""

    model: PreTrainedModel

    def over(self, begin: Begin = lambda inputs: None) -> Iterator[tuple[Any, Mapping[str, Tensor]]]:
        """Run them over each batch, and yield what they made of it, and the batch, of which `begin` is told before.

        Raises:
            InputError: there is no batch.
        """

    def gradients(self, made: Any, of: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return the gradients of the sum of the losses of all `count` tokens that count, with respect to `of`."""


class WholeReading:
    """Runs a language model as a whole; made before anything hooks on to the model, which it first tries.

    Batches are those that `score_heads` takes.

    Raises:
        UnsupportedModel: the model does not predict the next token.
    """

    def __init__(self, model: PreTrainedModel, batches: Batches) -> None:
        require_language_model(model, "A criterion that looks at text")
        self.model, self._batches = model, batches
        self.losses = SegmentLoss(model)
        self.losses.try_out()

    def over(self, begin: Begin = lambda inputs: None) -> Iterator[tuple[SegmentOutputs, Mapping[str, Tensor]]]:
        """Run the model over the batches, on its device and in evaluation mode; see `Reading`."""
        read = []
        with evaluating(self.model), frozen(self.model):
            for batch in self._batches:
                read.append(batch)
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                begin(inputs)
                yield self.losses(self.model, inputs), inputs
        if not read:
            raise InputError("This criterion looks at text, but no batch was given.")
        # Whoever reads again gets the same, though they came one by one.
        self._batches = read

    def gradients(self, made: SegmentOutputs, of: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return the gradients of all tokens' losses; see `Reading`."""
        # The loss is a mean over tokens; a position's gradient should not depend on how many there are.
        return torch.autograd.grad(made.loss * count, of)


def predicting(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of a batch predict a token that counts, (B, T), bool."""
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if hasattr(model.config, "memory_length"):
        return everywhere
    return pad(inputs.get("scored", everywhere)[:, 1:], (0, 1))
