"""Perplexity and bits per byte of a language model: sliding memory, every token scored once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from deadhead.errors import InputError, UnsupportedModel
from deadhead.modes import evaluating

if TYPE_CHECKING:
    from deadhead.data import TokenStream


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts a text.

    Args:
        loss: mean negative log-likelihood, nats per token.
        perplexity: exp(loss).
        word_perplexity: the same per word: exp(total nats / words).
        bits_per_byte: total bits / bytes of the text.
        tokens: tokens scored.
        tokens_per_second: how fast.
    """

    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_per_second: float


def evaluate(
    model: PreTrainedModel,
    text: TokenStream,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every token of `text` but the first once, each after the true text before it.

    The text is cut into `batch_size` contiguous rows that are read segment by segment with a sliding cache; every row
    but the first begins one memory length early, without being scored there, so that it starts with a full memory.
    (What deeper layers know of the text before that is missing there; with `batch_size` 1 nothing is.)

    Args:
        model: an All-attention model; switched to evaluation for the time.
        text: tokens and the numbers of bytes and words they stand for.
        batch_size: rows read side by side; short texts take fewer.
        limit: score only this many tokens, from the beginning.
        progress: called with the number of segments done and to do.

    Raises:
        InputError: the text has fewer than two tokens, or tokens that the model doesn't have.
        UnsupportedModel: the model has no segment memory.
    """
    config = model.config
    if not hasattr(config, "memory_length"):
        raise UnsupportedModel(
            f"Evaluation slides a memory along the text, which a model of type {config.model_type!r} does not have."
        )
    targets = len(text.tokens) - 1 if limit is None else min(limit, len(text.tokens) - 1)
    if targets < 1:
        raise InputError(f"A text of at least 2 tokens is needed to measure perplexity, but it has {len(text.tokens)}.")
    segment, memory = config.segment_length, config.memory_length
    # A token outside the vocabulary would crash or, on a GPU, corrupt the process.
    largest = int(text.tokens[: targets + 1].max())
    if largest >= config.vocab_size:
        raise InputError(
            f"The text has token {largest}, but the model's vocabulary ends at {config.vocab_size - 1}; "
            "use the tokenizer the model was trained with."
        )
    rows = max(1, min(batch_size, targets // (4 * (segment + memory))))
    layout = _Rows(text.tokens[: targets + 1], rows, warm_up=memory if rows > 1 else 0)
    starts = range(0, layout.num_columns, segment)
    total, cache = 0.0, None
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        for done, start in enumerate(starts):
            stop = min(start + segment, layout.num_columns)
            # The cache reaches back one memory length; so must the mask.
            seen = layout.valid(max(0, start - memory), stop)
            outputs = model(
                input_ids=layout.inputs(start, stop).to(model.device),
                attention_mask=None if seen.all() else seen.to(model.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            wanted = layout.labels(start, stop).to(model.device)
            total += cross_entropy(
                outputs.logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            if progress is not None:
                progress(done + 1, len(starts))
    seconds = time.perf_counter() - begin
    share = targets / max(len(text.tokens) - 1, 1)
    return Evaluation(
        loss=total / targets,
        perplexity=_exp(total / targets),
        word_perplexity=_exp(total / max(text.num_words * share, 1)),
        bits_per_byte=total / math.log(2) / max(text.num_bytes * share, 1),
        tokens=targets,
        tokens_per_second=targets / seconds,
    )


class _Rows:
    """A text laid out in contiguous rows that are read side by side, a few columns at a time.

    Row r holds inputs r·width … (r + 1)·width − 1; `warm_up` columns before them are read but not scored.
    """

    def __init__(self, tokens: np.ndarray, rows: int, *, warm_up: int) -> None:
        self.tokens = tokens
        self.num_targets = len(tokens) - 1
        self.width = -(-self.num_targets // rows)
        self.warm_up = warm_up
        self.num_columns = warm_up + self.width
        self.first = (np.arange(rows) * self.width - warm_up)[:, None]

    def _positions(self, start: int, stop: int) -> np.ndarray:
        return self.first + np.arange(start, stop)

    def _take(self, position: np.ndarray, where: np.ndarray, otherwise: int) -> torch.Tensor:
        taken = self.tokens[np.clip(position, 0, self.num_targets)].astype(np.int64)
        return torch.from_numpy(np.where(where, taken, otherwise))

    def inputs(self, start: int, stop: int) -> torch.Tensor:
        position = self._positions(start, stop)
        return self._take(position, (position >= 0) & (position < self.num_targets), 0)

    def labels(self, start: int, stop: int) -> torch.Tensor:
        position = self._positions(start, stop)
        scored = (position < self.num_targets) & (np.arange(start, stop) >= self.warm_up)
        return self._take(position + 1, scored, -100)

    def valid(self, start: int, stop: int) -> torch.Tensor:
        position = self._positions(start, stop)
        return torch.from_numpy((position >= 0) & (position < self.num_targets))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
