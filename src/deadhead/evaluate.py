"""Perplexity and bits per byte of a language model: sliding memory, every token scored once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
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
    rows = max(1, min(batch_size, targets // (4 * (segment + memory))))
    ids, labels, mask = _rows(text.tokens[: targets + 1], rows, memory)
    # One label at least is real; a token outside the vocabulary would crash or, on a GPU, corrupt the process.
    if int(ids.max()) >= config.vocab_size:
        raise InputError(
            f"The text has token {int(ids.max())}, but the model's vocabulary ends at {config.vocab_size - 1}; "
            "use the tokenizer the model was trained with."
        )
    total, cache = 0.0, None
    starts = range(0, ids.shape[1], segment)
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        for done, start in enumerate(starts):
            part = slice(start, start + segment)
            seen = mask[:, : start + segment]
            outputs = model(
                input_ids=torch.from_numpy(ids[:, part]).to(model.device),
                attention_mask=None if seen.all() else torch.from_numpy(seen).to(model.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            wanted = torch.from_numpy(labels[:, part]).to(model.device)
            logits = outputs.logits.float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, wanted.flatten(), ignore_index=-100, reduction="sum"
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


def _rows(tokens: np.ndarray, rows: int, warm_up: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the text out in rows: inputs, next tokens (−100 where not scored), and a mask that is 0 on padding."""
    targets = len(tokens) - 1
    width = -(-targets // rows)
    position = np.arange(-warm_up if rows > 1 else 0, width) + (np.arange(rows) * width)[:, None]
    valid = (position >= 0) & (position < targets)
    # In 64 bits first: stored tokens have no sign, and −100 would wrap round.
    ids = np.where(valid, tokens[np.clip(position, 0, targets)].astype(np.int64), 0)
    labels = np.where(valid, tokens[np.clip(position + 1, 0, targets)].astype(np.int64), -100)
    labels[:, : position.shape[1] - width] = -100
    return ids, labels, valid


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
