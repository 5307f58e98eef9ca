"""Compare a runtime's outputs with PyTorch's: the logits of a text, and a greedy continuation.

Dimensions: B texts, T positions of the prompt, C tokens of the continuation, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.errors import ExportError
from deadhead.modes import evaluating

_PROMPT, _CONTINUATION = 24, 16
LIKELIEST = 20
"""Of how many tokens a position's log-probabilities are compared where a runtime does not give its logits."""


@dataclass(frozen=True)
class Reference:
    """PyTorch's outputs: a prompt's greedy continuation, and the logits of all tokens but the last, (T + C − 1, V).

    For models that do not continue texts: no continuation, and the first output for the prompt.
    """

    prompt_T: np.ndarray
    continuation_C: np.ndarray
    logits: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        """The tokens whose logits are `logits`, (T + C − 1,)."""
        return np.concatenate([self.prompt_T, self.continuation_C[:-1]])


@dataclass(frozen=True)
class Agreement:
    """How near the outputs of a runtime, given by name and version, are to PyTorch's.

    `logit_difference` is max|Δ| / max|reference| of logits over all positions. If a runtime does not return logits, Δ
    is that of the most likely tokens' log-probabilities. `tolerance` is the largest difference allowed. `tokens_equal`
    is the number of tokens before the first difference, of the C `tokens` of the greedy continuation.
    """

    runtime: str
    logit_difference: float
    tolerance: float
    tokens: int
    tokens_equal: int


def first_output(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return a model's first output for a text: logits, or the last hidden states of one without a head."""
    found: Tensor = model(input_ids=ids_BT, **({"use_cache": False} if model.can_generate() else {}))[0]
    return found


@torch.inference_mode()
def make_reference(model: PreTrainedModel, seed: int = 0) -> Reference:
    """Compute logits of a random text and its greedy continuation, without a cache, in the model's precision."""
    vocabulary = model.config.get_text_config().vocab_size
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompt = int(min(_PROMPT, longest // 2))
    steps = int(min(_CONTINUATION, longest - prompt))
    drawn = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(seed))
    ids_BT: Tensor = drawn.to(model.device)
    with evaluating(model):
        for _ in range(steps if model.can_generate() else 0):
            logits = first_output(model, ids_BT)
            ids_BT = torch.cat([ids_BT, logits[:, -1:].argmax(-1)], dim=1)
        if not model.can_generate():
            logits = first_output(model, ids_BT)
    found = ids_BT[0].cpu().numpy()
    return Reference(found[:prompt], found[prompt:], logits[0].float().cpu().numpy())


def compare(reference: Reference, logits: np.ndarray, *, runtime: str, tolerance: float) -> Agreement:
    """Return how near `logits`, in the reference's shape, are to the reference.

    Raises:
        ExportError: they are not near enough, or not finite.
    """
    if logits.shape != reference.logits.shape:
        raise ExportError(
            f"{runtime} gave logits of shape {logits.shape} where PyTorch gives {reference.logits.shape}; nothing was "
            "left at the place of the export."
        )
    count = len(reference.continuation_C)
    tokens = logits[-count:].argmax(-1) if count else reference.continuation_C
    return _agreement(reference, float(np.abs(logits - reference.logits).max()), tokens, runtime, tolerance)


def compare_likeliest(
    reference: Reference, tokens: list[int], positions: list[dict[int, float]], *, runtime: str, tolerance: float
) -> Agreement:
    """Return how near a runtime is that returns only greedy tokens and the log-probabilities of the most likely ones.

    Positions after a token that differs belong to another text, and are not compared.

    Raises:
        ExportError: they are not near enough, or not finite.
    """
    found = np.array(tokens)
    expected = reference.continuation_C
    same = len(reference.prompt_T) + int((found == expected).cumprod().sum())
    log_probabilities = torch.from_numpy(reference.logits).log_softmax(-1).numpy()
    apart = [
        value - log_probabilities[place, token]
        for place, position in enumerate(positions[:same])
        for token, value in position.items()
    ]
    return _agreement(reference, float(np.abs(apart).max()), found, runtime, tolerance)


def _agreement(reference: Reference, most: float, tokens: np.ndarray, runtime: str, tolerance: float) -> Agreement:
    difference = most / max(float(np.abs(reference.logits).max()), 1e-30)
    count = len(reference.continuation_C)
    equal = count and int((tokens == reference.continuation_C).cumprod().sum())
    if not difference <= tolerance:  # NaN too
        raise ExportError(
            f"The exported model does not compute in {runtime} what it computes in PyTorch: its outputs differ by "
            f"{difference:.1e} of the largest, {tolerance:.0e} at most was expected, and {equal} of {count} greedy "
            "tokens are equal; nothing was left at the place of the export."
        )
    return Agreement(runtime, difference, tolerance, count, equal)
