"""Distillation: a model learns from the output distribution of another, the teacher, beside the text itself.

    loss = (1 − α) · NLL + α · T² · KL(softmax(teacher / T) ‖ softmax(model / T)),

with weight α and temperature T (Hinton, Vinyals, Dean 2015, arXiv 1503.02531), means over all tokens that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.measure.losses import require_language_model


def require_same_vocabulary(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Check that a teacher reads the tokens of a model and gives each of them a probability.

    Raises:
        InputError: it has another number of tokens.
        UnsupportedModel: it predicts no next token.
    """
    require_language_model(teacher, "Distillation")
    theirs, ours = (one.config.get_text_config().vocab_size for one in (teacher, model))
    if theirs != ours:
        raise InputError(
            f"A teacher of the same vocabulary was expected, but the model has {ours} tokens and the teacher {theirs}."
        )


def require_weight(weight: float) -> None:
    """Check that what a teacher says counts; InputError if its weight, α, is 0."""
    if not weight:
        raise InputError("A teacher was given, but the weight of what it says, distill, is 0; set it, say to 0.5.")


class Distillation:
    """The teacher, of the same vocabulary, and what it says of each batch; α is `weight`, in (0, 1]."""

    def __init__(self, teacher: PreTrainedModel, *, weight: float, temperature: float) -> None:
        require_weight(weight)
        self.teacher = teacher.eval()
        self.weight = weight
        self.temperature = temperature
        # Hidden states of the segment before, for teachers with segment memory.
        self.memory: tuple[Tensor, ...] | None = None
        self.divergence: Tensor | float = 0.0
        self.batches = 0

    def loss(self, nll: Tensor, logits: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """Return the mixed loss of a batch, 0-dimensional, of the model's own on the text and its logits, (B, T, V).

        The batch has `input_ids`, and `is_first` where rows begin anew; there may be `scored`, whether a token counts.
        """
        expected = self._teacher_logits(inputs)
        if logits is None or expected is None:
            raise InputError("Distillation compares whole distributions, which an adaptive softmax does not compute.")
        if "scored" in inputs and not bool(inputs["scored"].all()):
            # A position tells of the token after it.
            counts_BT = F.pad(inputs["scored"][:, 1:], (0, 1))
            logits, expected = logits[counts_BT], expected[counts_BT]
        found_NV, wanted_NV = (
            F.log_softmax(values.flatten(0, -2).float() / self.temperature, dim=-1) for values in (logits, expected)
        )
        divergence = F.kl_div(found_NV, wanted_NV, reduction="batchmean", log_target=True)
        self.divergence = self.divergence + divergence.detach()
        self.batches += 1
        return (1 - self.weight) * nll + self.weight * self.temperature**2 * divergence

    def mean_divergence(self) -> float:
        """Return the mean of KL(teacher ‖ model) over the batches since the last call, in nats a token."""
        mean = float(self.divergence) / max(self.batches, 1)
        self.divergence, self.batches = 0.0, 0
        return mean

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> Tensor | None:
        ids = inputs["input_ids"]
        if self.teacher.device != ids.device:
            self.teacher.to(ids.device)
        if not hasattr(self.teacher.config, "memory_length"):
            return self.teacher(input_ids=ids, use_cache=False).logits
        memory = None if bool(inputs["is_first"].any()) else self.memory
        outputs = self.teacher(input_ids=ids, use_cache=False, memory=memory)
        self.memory = outputs.memory
        return outputs.logits
