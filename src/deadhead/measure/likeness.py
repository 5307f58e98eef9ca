"""How near one model is to another: KL divergence of their predictions after each token, and how often they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.errors import InputError, typed_but
from deadhead.layouts.refusals import require_weights
from deadhead.measure.divergence import divergence
from deadhead.measure.losses import Batches, SegmentLoss, SegmentOutputs, require_language_model
from deadhead.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How near a model is to a reference model on a text.

    Args:
        divergence: mean KL(reference ‖ model), in nats per token.
        agreement: share of the tokens after which both models predict the same most likely token.
        tokens: number of tokens compared.
    """

    divergence: float
    agreement: float
    tokens: int


@typed_but("model", "reference", "batches")
def likeness(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    batches: Batches,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Likeness:
    """Compare what two language models predict after each token of a text.

    Args:
        model: a language model.
        reference: another one with the same vocabulary; it is moved to the device of `model`.
        batches: dictionaries with `input_ids` (B, T) and the other inputs that `score_heads` takes. Predictions of
            tokens that are not `scored` do not count.
        progress: called with the number of batches done.

    Returns:
        KL divergence, agreement, and the number of tokens compared.

    Raises:
        InputError: the vocabularies have different sizes, a softmax is adaptive, or there is no text.
        UnsupportedModel: one of the models does not predict the next token.
    """
    for each in (model, reference):
        require_language_model(each, "Comparing")
        require_weights(each, "Comparing")
    words = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if words[0] != words[1]:
        raise InputError(
            f"Models with the same vocabulary were expected, but one has {words[0]} tokens and the other {words[1]}."
        )
    reference.to(model.device)  # type: ignore[arg-type]
    losses = SegmentLoss(model), SegmentLoss(reference)
    total, same, tokens = 0.0, 0.0, 0
    with torch.inference_mode(), evaluating(model, reference):
        for done, batch in enumerate(batches, 1):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            ours, theirs = (loss(each, inputs) for loss, each in zip(losses, (model, reference), strict=True))
            apart, agreeing, count = _compared(ours, theirs)
            total, same, tokens = total + apart, same + agreeing, tokens + count
            progress(done)
    if not tokens:
        raise InputError("There is no token to compare the models on; give them more text.")
    return Likeness(divergence=total / tokens, agreement=same / tokens, tokens=tokens)


def _compared(ours: SegmentOutputs, theirs: SegmentOutputs) -> tuple[float, float, int]:
    """Return the sum of KL(theirs ‖ ours) over a batch's tokens, the number of agreements, and that of the tokens."""
    if ours.read.is_adaptive or theirs.read.is_adaptive:
        raise InputError("Whole distributions are compared, which an adaptive softmax does not compute.")

    def sums(states_ND: Tensor, theirs_ND: Tensor) -> Tensor:
        found_NV, expected_NV = ours.read.logits(states_ND), theirs.read.logits(theirs_ND)
        return torch.stack([divergence(found_NV, expected_NV), (found_NV.argmax(-1) == expected_NV.argmax(-1)).sum()])

    counts_BT = ours.wanted_BT != -100
    apart, rest = ours.read.sums(sums, counts_BT, theirs.read.states_BTD)
    return float(apart), float(rest[0]), int(counts_BT.sum())
