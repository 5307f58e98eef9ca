"""The language-modelling loss of a batch of contiguous segments, with the memory of those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts.hugging_face import has_encoder_and_decoder


def require_language_model(model: PreTrainedModel, what: str) -> None:
    """Check that a model predicts the next token, as `what` needs; encoders, alone or not, and classifiers do not.

    Raises:
        UnsupportedModel: it does not.
    """
    if not hasattr(model, "can_generate"):
        raise UnsupportedModel(
            f"{what} needs a model of transformers, but an object of type {type(model).__name__} came."
        )
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


class SegmentLoss:
    """Computes losses of successive batches; a model with segment memory sees the segments before."""

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        self.has_memory = hasattr(model.config, "memory_length")
        self.memory: tuple[Tensor, ...] | None = None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Return the outputs of the model, or of a wrapper: `loss` is the mean negative log-likelihood of a token.

        The inputs are `input_ids` (B, T); with memory also `labels` (B, T), the next tokens, and `is_first` (B,).
        Without memory there may be `scored` (B, T): whether a token counts, as all do otherwise.
        """
        ids = inputs["input_ids"]
        if not self.has_memory:
            # Every language model shifts the labels itself; not all take labels that are shifted.
            labels = ids.masked_fill(~inputs["scored"], -100) if "scored" in inputs else ids
            return model(input_ids=ids, labels=labels, use_cache=False)
        memory = None if bool(inputs["is_first"].any()) else self.memory
        labels = inputs["labels"]
        outputs = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False, memory=memory)
        self.memory = outputs.memory
        return outputs
