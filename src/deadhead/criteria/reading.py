"""What criteria that look at text share: a model runs over batches, and which positions of a batch count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.measure.losses import Batches, SegmentLoss, SegmentOutputs, require_language_model
from deadhead.modes import evaluating


class Reading:
    """Runs a language model over batches; made before anything hooks on to the model, which it first tries.

    Raises:
        UnsupportedModel: the model does not predict the next token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_language_model(model, "A criterion that looks at text")
        self.model = model
        self.losses = SegmentLoss(model)
        self.losses.try_out()

    def over(
        self, batches: Batches, begin: Callable[[Mapping[str, Tensor]], None] = lambda inputs: None
    ) -> Iterator[tuple[SegmentOutputs, Mapping[str, Tensor]]]:
        """Run the model over batches, in evaluation mode, and yield each one's outputs and inputs.

        Args:
            batches: as `score_heads` takes them.
            begin: is told each batch, on the model's device, before the model runs.

        Raises:
            InputError: there is no batch.
        """
        has_text = False
        with evaluating(self.model):
            for batch in batches:
                has_text = True
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                begin(inputs)
                yield self.losses(self.model, inputs), inputs
        if not has_text:
            raise InputError("This criterion looks at text, but no batch was given.")


def predicting(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of a batch predict a token that counts, (B, T), bool."""
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if hasattr(model.config, "memory_length"):
        return everywhere
    return pad(inputs.get("scored", everywhere)[:, 1:], (0, 1))
