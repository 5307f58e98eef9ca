"""Perplexity and bits per byte of a language model, by a sliding window or memory; every token is scored once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from deadhead.data import TokenStream
from deadhead.errors import InputError, typed
from deadhead.layouts.refusals import require_weights
from deadhead.measure.last_states import StateReader
from deadhead.measure.losses import require_language_model
from deadhead.measure.positions import max_positions
from deadhead.modes import evaluating

_WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts a text.

    Args:
        loss: mean negative log-likelihood, in nats per token.
        perplexity: exp(loss).
        word_perplexity: perplexity per word: exp(total nats / words).
        bits_per_byte: total bits / bytes of the text.
        tokens: number of tokens scored.
        tokens_per_second: tokens scored per second.
        rows: number of rows that the text was divided into.
        length: the most tokens of a row; with segment memory, all tokens of a row, those of its memory included.
        context: the fewest tokens of text before a scored token, except at the beginning of the text.
        prefix: the tokens that the tokenizer puts before a text; each row begins with them, and they are not scored.
    """

    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_per_second: float
    rows: int
    length: int
    context: int
    prefix: tuple[int, ...]

    @property
    def cut(self) -> str:
        """How the text was divided, in words."""
        before = _counted(len(self.prefix), "token")
        begins = f", each with {before} that the tokenizer puts before a text" if self.prefix else ""
        rows = f"{_counted(self.rows, 'row')} of at most {_counted(self.length, 'token')}{begins}"
        return f"{rows}; every token scored once, after at least {self.context:,} others where there are as many"


@typed
def evaluate(
    model: PreTrainedModel,
    text: TokenStream,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure the perplexity of a language model on a text.

    Every token is scored once, after the true text before it. The first token is scored only if the text has a prefix.
    If the text says which tokens are `scored`, the others are only read.

    A model with segment memory reads the text as `batch_size` contiguous rows, segment by segment, with a sliding
    cache. Every row but the first begins one memory length early, without scores, so that its memory is full. (What
    deeper layers would know of the text before that is missing; with `batch_size` 1 nothing is missing.)

    For any other causal language model, a window slides along the text by half its length. Each token is scored in the
    first window that reaches it, so after at least half a window of text, except at the beginning. Every window begins
    with the text's `prefix`, the tokens that its tokenizer puts before a text.

    Args:
        model: a causal language model; it is in evaluation mode while it is measured.
        text: tokens, and the numbers of bytes and words that they stand for.
        batch_size: rows read side by side; short texts take fewer.
        limit: score only this many tokens, from the beginning.
        window: tokens that a model without memory sees at once, the prefix included; by default 512, or all its
            positions if it has fewer.
        progress: called with the number of segments done and to do.

    Returns:
        Loss, perplexity, bits per byte, and how the text was divided.

    Raises:
        InputError: the text has fewer than two tokens, or tokens that the model doesn't have, or the window does not
            fit the model.
        UnsupportedModel: the model does not predict the next token.
    """
    require_language_model(model, "Perplexity")
    require_weights(model, "Perplexity")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, but is {value}.")
    has_memory = hasattr(model.config, "memory_length")
    prefix = () if has_memory else text.prefix
    # Nothing stands before the first token without a prefix.
    first = 0 if prefix else 1
    there = len(text.tokens) - first
    # Where in the text the tokens are that are to be scored.
    places = range(there) if text.scored is None else np.flatnonzero(text.scored[first:])
    counted = len(places) if limit is None else min(limit, len(places))
    if there < 1 or (counted < 1 and text.scored is None):
        raise InputError(
            f"A text of at least {_counted(first + 1, 'token')} is needed to measure perplexity, but it has "
            f"{len(text.tokens)}."
        )
    if text.scored is not None and (has_memory or not counted):
        raise InputError(
            "Answers can be measured alone (answers_only) only for models without segment memory and texts with "
            "answers; leave answers_only out."
        )
    tokens = text.tokens if counted == len(places) else text.tokens[: places[counted - 1] + 1 + first]
    require_known(model, max(int(tokens.max()), *prefix, 0), of="text")
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        if has_memory:
            if window is not None:
                raise InputError("This model reads the text with a memory of its own length; leave the window out.")
            total, cut = _slide_memory(model, tokens, batch_size, progress)
        else:
            most = max_positions(model)
            window = min(_WINDOW, most or _WINDOW) if window is None else window
            least = 2 + len(prefix)
            if window < least or (most is not None and window > most):
                allowed = f"{least} to {most or 'any number of'} tokens"
                raise InputError(f"The window must have {allowed}, but got {window}.")
            total, cut = _slide_window(model, tokens, text.scored, prefix, window, batch_size, progress)
    seconds = time.perf_counter() - begin
    share = counted / len(places)
    return Evaluation(
        loss=total / counted,
        perplexity=_exp(total / counted),
        word_perplexity=_exp(total / max(text.num_words * share, 1)),
        bits_per_byte=total / math.log(2) / max(text.num_bytes * share, 1),
        tokens=counted,
        tokens_per_second=counted / seconds,
        prefix=prefix,
        **cut,
    )


def require_known(model: PreTrainedModel, largest: int, *, of: str) -> None:
    """Check that a model has the largest token of a text: a larger one would crash it, or corrupt a process on a GPU.

    Raises:
        InputError: the model's vocabulary ends before that token; the message calls the text `of`.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise InputError(
            f"The {of} has token {largest}, but the model's vocabulary ends at {vocabulary - 1}; "
            "use the tokenizer the model was trained with."
        )


def _slide_window(
    model: PreTrainedModel,
    tokens: np.ndarray,
    scored_N: np.ndarray | None,
    prefix: tuple[int, ...],
    window: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> tuple[float, dict[str, int]]:
    """Return the nats of all tokens, each scored in the first window that reaches it, and how the text was divided.

    Without a prefix the first token is not scored.
    """
    width = window - len(prefix)
    stride = width // 2
    last = len(tokens) - 1
    # Each window but the first scores its second half: what comes up to token `scored` is there to be seen only.
    windows = [(0, min(width, last), -1 if prefix else 0)]
    while windows[-1][1] < last:
        stop = min(windows[-1][1] + stride, last)
        windows.append((max(0, stop - width), stop, windows[-1][1]))
    begin, reader = np.array(prefix, dtype=np.int64), StateReader(model)
    total = 0.0
    # Windows of one length can be stacked; all but the first and the last have the same.
    for done in range(0, len(windows), batch_size):
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for start, stop, scored in windows[done : done + batch_size]:
            groups.setdefault(stop - start, []).append((start, stop, scored))
        for group in groups.values():
            rows = [np.concatenate([begin, tokens[start : stop + 1].astype(np.int64)]) for start, stop, _ in group]
            ids = torch.from_numpy(np.stack(rows))
            read = reader(model, input_ids=ids[:, :-1].to(model.device))
            wanted = ids.clone()
            for row, (start, stop, scored) in enumerate(group):
                if scored_N is not None:
                    wanted[row, len(prefix) :][~torch.from_numpy(scored_N[start : stop + 1].copy())] = -100
                wanted[row, : scored - start + len(prefix) + 1] = -100
            total += read.nll(wanted[:, 1:]).item()
        progress(min(done + batch_size, len(windows)), len(windows))
    longest = len(prefix) + windows[0][1]
    return total, {"rows": len(windows), "length": longest, "context": width - stride + 1}


def _slide_memory(
    model: PreTrainedModel, tokens: np.ndarray, batch_size: int, progress: Callable[[int, int], None]
) -> tuple[float, dict[str, int]]:
    """Return the nats of all tokens but the first, and how the text was divided.

    Contiguous rows are read side by side with a sliding cache. Row r scores the targets of inputs
    r·width … (r + 1)·width − 1; the memory's columns before them are only read.
    """
    segment, memory = model.config.segment_length, model.config.memory_length
    targets = len(tokens) - 1
    rows = max(1, min(batch_size, targets // (4 * (segment + memory))))
    width, warm_up = -(-targets // rows), memory if rows > 1 else 0
    first_R1 = (np.arange(rows) * width - warm_up)[:, None]
    starts = range(0, warm_up + width, segment)
    total, cache, reader = 0.0, None, StateReader(model)
    for done, start in enumerate(starts):
        columns = np.arange(max(0, start - memory), min(start + segment, warm_up + width))
        # The cache reaches back one memory length; so must the mask.
        places = first_R1 + columns
        seen = (places >= 0) & (places < targets)
        new = columns >= start
        found = places.clip(0, targets - 1)[:, new]
        ids = torch.from_numpy(np.where(seen[:, new], tokens[found].astype(np.int64), 0))
        is_scored = seen & (columns >= warm_up)
        wanted = torch.from_numpy(np.where(is_scored[:, new], tokens[found + 1].astype(np.int64), -100))
        read = reader(
            model,
            input_ids=ids.to(model.device),
            attention_mask=None if seen.all() else torch.from_numpy(seen).to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache = read.outputs.past_key_values
        total += read.nll(wanted).item()
        progress(done + 1, len(starts))
    return total, {"rows": rows, "length": warm_up + width, "context": memory}


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
