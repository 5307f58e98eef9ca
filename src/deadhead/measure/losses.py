"""The language-modelling loss of a batch of contiguous segments, with the memory of those before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts.hugging_face import has_encoder_and_decoder
from deadhead.measure.last_states import LastStates, StateReader, few_tokens, nll, whole_logits
from deadhead.modes import evaluating, seeded

Batches = Iterable[Mapping[str, Tensor]]
"""Batches of text, each with `input_ids` (B, T); for a model with segment memory, in the order of the text, `labels`
(B, T) and `is_first` (B,) too, for others perhaps `scored` (B, T): which tokens count."""


def require_language_model(model: PreTrainedModel, what: str) -> None:
    """Check that a model predicts the next token, which `what` needs. Classifiers and models with encoders do not.

    Raises:
        UnsupportedModel: it does not.
    """
    if not hasattr(model, "can_generate"):
        raise UnsupportedModel(f"{what} needs a transformers model, but got an object of type {type(model).__name__}.")
    if not model.can_generate():
        raise UnsupportedModel(
            f"{what} needs a model that predicts the next token, but {type(model).__name__} has no such loss; it can "
            "be cut by a plan, pruned by criterion 'magnitude', or trained with deadhead.SparsityCallback in a Trainer "
            "of your own."
        )
    if has_encoder_and_decoder(model):
        raise UnsupportedModel(
            f"{what} needs a model that predicts the next token of a text, but {type(model).__name__} has an encoder "
            "and a decoder, of which deadhead prunes neither."
        )


@dataclass(frozen=True, kw_only=True)
class SegmentOutputs:
    """A model's outputs on a batch.

    Args:
        read: its outputs and states; with the logits of all tokens, if `loss` was computed by the model.
        wanted_BT: each position's next token; -100 where it does not count.
        own_loss: as the model computes it; None where logits of all tokens at once would take too much memory.
    """

    read: LastStates
    wanted_BT: Tensor
    own_loss: Tensor | None

    @property
    def loss(self) -> Tensor:
        """The mean negative log-likelihood of a token, 0-dimensional; backward can be called once."""
        if self.own_loss is not None:
            return self.own_loss
        return self.read.nll(self.wanted_BT) / self.count

    @property
    def count(self) -> Tensor:
        """How many tokens count."""
        return (self.wanted_BT != -100).sum()


class SegmentLoss:
    """Computes the losses of successive batches; a model with segment memory sees the previous segments."""

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        self.has_memory = hasattr(model.config, "memory_length")
        self.memory: tuple[Tensor, ...] | None = None
        self.reader = StateReader(model)
        self._is_mean: bool | None = None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> SegmentOutputs:
        """Run the model, or a wrapper, on a batch; `loss` of the result is the mean negative log-likelihood of a token.

        The inputs are `input_ids` (B, T); with memory also `labels` (B, T), the next tokens, and `is_first` (B,).
        Without memory there may be `scored` (B, T): whether each token counts. By default all do.
        """
        ids = inputs["input_ids"]
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.has_memory:
            given["memory"] = None if bool(inputs["is_first"].any()) else self.memory
            wanted = inputs["labels"]
            labels = {"labels": wanted, "shift_labels": wanted}
        else:
            # Every language model shifts the labels itself; not all take labels that are shifted.
            labels = {"labels": ids.masked_fill(~inputs["scored"], -100) if "scored" in inputs else ids}
            wanted = functional.pad(labels["labels"][:, 1:], (0, 1), value=-100)
        loss = None
        if self.reader.is_apart(model, ids) and self._is_mean_nll():
            read = self.reader(model, **given)
        else:
            outputs = model(**given, **labels)
            loss, read = outputs.loss, whole_logits(outputs)
        if self.has_memory:
            self.memory = read.outputs.memory
        return SegmentOutputs(read=read, wanted_BT=wanted, own_loss=loss)

    def try_out(self) -> None:
        """Find out by a trial how to compute the model's losses; call this before registering hooks that count."""
        self.reader.try_out()
        if self.reader.fits:
            self._is_mean_nll()

    @torch.no_grad()
    def _is_mean_nll(self) -> bool:
        """Try on a few tokens whether the model's loss is the mean over tokens; some add that of their experts."""
        if self._is_mean is None:
            model, few = self.reader.model, few_tokens(self.reader.model)
            labels = few.clone()
            labels[:, 1] = -100
            with evaluating(model), seeded():
                loss = model(input_ids=few, labels=labels, use_cache=False).loss
                logits_NV = model(input_ids=few, use_cache=False).logits[:, :-1].flatten(0, 1)
            expected = nll(logits_NV, labels[:, 1:].flatten()) / (labels[:, 1:] != -100).sum()
            self._is_mean = bool((loss - expected).abs() <= 1e-5 * expected)
        return self._is_mean
