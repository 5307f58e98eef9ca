"""What all criteria that need text share: running a model over batches, and the positions of a batch that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from deadhead.data.shares import ALONE, Shares
from deadhead.errors import InputError
from deadhead.measure.losses import Batches, SegmentLoss, SegmentOutputs, require_language_model
from deadhead.modes import evaluating, frozen

Begin = Callable[[Mapping[str, Tensor]], None]


class Reading(Protocol):
    """Runs modules of a language model over a text while a criterion observes them.

    If several processes share the text, a reading covers the batches of this process. A criterion that sums over
    batches then adds up its sums over all processes by `shares`, in every process.
    """

    model: PreTrainedModel
    shares: Shares

    def over(self, begin: Begin = lambda inputs: None) -> Iterator[tuple[Any, Mapping[str, Tensor]]]:
        """Run the modules over each batch; yield their outputs and the batch. `begin` is called before each batch.

        Raises:
            InputError: no process has a batch.
        """

    def gradients(self, made: Any, of: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return the gradients of the summed losses of all `count` tokens that count, with respect to `of`."""


class WholeReading:
    """Runs a language model as a whole. Make it before you register hooks, because it first runs the model on trial.

    Args:
        model: the model.
        batches: batches as `score_heads` takes them, the same in every process.
        shares: which of the batches this process reads.

    Raises:
        UnsupportedModel: the model does not predict the next token.
    """

    def __init__(self, model: PreTrainedModel, batches: Batches, shares: Shares = ALONE) -> None:
        require_language_model(model, "A criterion that looks at text")
        self.model, self.shares = model, shares
        # Those that others read are passed over.
        self._batches: Iterable[tuple[Mapping[str, Tensor], bool]] = _dealt(batches, shares)
        self.losses = SegmentLoss(model)
        self.losses.try_out()

    def over(self, begin: Begin = lambda inputs: None) -> Iterator[tuple[SegmentOutputs, Mapping[str, Tensor]]]:
        """Run the model over the batches, on its device and in evaluation mode; see `Reading`."""
        read = []
        with evaluating(self.model), frozen(self.model):
            for batch, is_own in self._batches:
                read.append((batch, is_own))
                if not is_own:
                    continue
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                begin(inputs)
                yield self.losses(self.model, inputs), inputs
        if not read:
            raise InputError("This criterion needs text, but got no batch; give it batches.")
        # Whoever reads again gets the same, though they came one by one.
        self._batches = read

    def gradients(self, made: SegmentOutputs, of: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return the gradients of all tokens' losses; see `Reading`."""
        # The loss is a mean over tokens; a position's gradient should not depend on how many there are.
        return torch.autograd.grad(made.loss * count, of)


def _dealt(batches: Batches, shares: Shares) -> Iterator[tuple[Mapping[str, Tensor], bool]]:
    dealing = shares.dealing()
    return ((batch, dealing.is_own(batch["input_ids"].numel())) for batch in batches)


def predicting(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of a batch predict a token that counts, (B, T), bool."""
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if hasattr(model.config, "memory_length"):
        return everywhere
    return pad(inputs.get("scored", everywhere)[:, 1:], (0, 1))
