"""Distillation: a model learns from the output distribution of a teacher, besides the text itself.

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
from deadhead.measure.divergence import divergence
from deadhead.measure.last_states import LastStates, StateReader, nll
from deadhead.measure.losses import SegmentOutputs, require_language_model


def require_same_vocabulary(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Check that a teacher reads the same tokens as a model and gives each of them a probability.

    Raises:
        InputError: the teacher has another number of tokens.
        UnsupportedModel: the teacher does not predict the next token.
    """
    require_language_model(teacher, "Distillation")
    theirs, ours = (one.config.get_text_config().vocab_size for one in (teacher, model))
    if theirs != ours:
        raise InputError(
            f"A teacher of the same vocabulary was expected, but the model has {ours} tokens and the teacher {theirs}."
        )


def require_weight(weight: float) -> None:
    """Check that the weight α of a teacher is not 0; raise InputError if it is."""
    if not weight:
        raise InputError(
            "A teacher was given, but its weight in the loss, distill, is 0; set distill, to 0.5 for instance."
        )


class Distillation:
    """A teacher of the same vocabulary, and the loss against it; α is `weight`, in (0, 1]."""

    def __init__(self, teacher: PreTrainedModel, *, weight: float, temperature: float) -> None:
        require_weight(weight)
        self.teacher = teacher.eval()
        self.reader = StateReader(teacher)
        self.weight = weight
        self.temperature = temperature
        # Hidden states of the segment before, for teachers with segment memory.
        self.memory: tuple[Tensor, ...] | None = None
        self.divergence: Tensor | float = 0.0
        self.batches = 0

    def loss(self, student: SegmentOutputs, inputs: dict[str, Any]) -> Tensor:
        """Return the mixed loss of a batch, a 0-dimensional tensor, from the model's output.

        The batch has `input_ids`, `is_first` (which rows begin anew) and optionally `scored` (which tokens count).
        """
        teacher = self._read(inputs)
        if student.read.is_adaptive or teacher.is_adaptive:
            raise InputError("Distillation compares whole distributions, which an adaptive softmax does not compute.")
        counts_BT, count = None, student.wanted_BT.numel()
        if "scored" in inputs and not bool(inputs["scored"].all()):
            # A position tells of the token after it.
            counts_BT = F.pad(inputs["scored"][:, 1:], (0, 1))
            count = int(counts_BT.sum())

        # What the model's own loss is not there for is summed along with the divergence.
        is_added = student.own_loss is None and self.weight < 1
        share = (1 - self.weight) / (self.weight * self.temperature**2) * count / student.count

        def sums(states_ND: Tensor, wanted_N: Tensor, theirs_ND: Tensor) -> Tensor:
            logits_NV = student.read.logits(states_ND)
            with torch.no_grad():
                expected_NV = teacher.logits(theirs_ND)
            apart = divergence(logits_NV, expected_NV, self.temperature)
            return torch.stack([apart + share * nll(logits_NV, wanted_N) if is_added else apart, apart])

        both, apart = student.read.sums(sums, counts_BT, student.wanted_BT, teacher.states_BTD)
        self.divergence = self.divergence + apart[0] / count
        self.batches += 1
        loss = self.weight * self.temperature**2 * (both / count)
        return loss if student.own_loss is None else (1 - self.weight) * student.own_loss + loss

    def mean_divergence(self) -> float:
        """Return the mean of KL(teacher ‖ model) over the batches since the last call, in nats a token."""
        mean = float(self.divergence) / max(self.batches, 1)
        self.divergence, self.batches = 0.0, 0
        return mean

    @torch.no_grad()
    def _read(self, inputs: dict[str, Any]) -> LastStates:
        ids = inputs["input_ids"]
        if self.teacher.device != ids.device:
            self.teacher.to(ids.device)
        if not hasattr(self.teacher.config, "memory_length"):
            return self.reader(self.teacher, input_ids=ids, use_cache=False)
        memory = None if bool(inputs["is_first"].any()) else self.memory
        found = self.reader(self.teacher, input_ids=ids, use_cache=False, memory=memory)
        self.memory = found.outputs.memory
        return found
