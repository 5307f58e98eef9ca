"""Self-generated text: rows that a language model samples from its own distribution, for calibration and recovery.

If you have no text that is like the model's training text, its own text comes nearest (Williams, Chrysostomou, Aletras
2024, arXiv 2410.17170). A model that was trained on conversations also writes the user's questions, if a row begins as
its chat template begins a user's turn (Magpie: Xu et al. 2024, arXiv 2406.08464).

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from deadhead.data.encoders import text_frame
from deadhead.data.turns import Turns, turns_of
from deadhead.errors import InputError, typed
from deadhead.layouts.refusals import require_weights
from deadhead.measure.cost import model_cost
from deadhead.measure.generate import plain_generation
from deadhead.measure.losses import require_language_model
from deadhead.measure.positions import require_positions
from deadhead.models.all_attention.cache import Room
from deadhead.modes import evaluating

# Rows written side by side, and bytes that their keys and values may take; on a CPU more rows are no faster.
_ROWS = {"cpu": 64}
_MOST_ROWS, _MOST_BYTES = 256, 2 * 10**9


def rows_at_once(model: PreTrainedModel, length: int, device: torch.device) -> tuple[int, int]:
    """Return the number of rows that a model writes side by side on a device, and the bytes of their cache."""
    each = model_cost(model, length=length).kv_cache_bytes
    rows = max(1, min(_ROWS.get(device.type, _MOST_ROWS), _MOST_BYTES // max(each, 1)))
    return rows, rows * each


@typed
def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Let a model write rows of text, each token drawn from its full distribution (temperature 1, no token excluded).

    A row begins with the tokens that the tokenizer puts before a text (BOS, say), followed by those that begin a user's
    turn if it has a chat template. With neither, a row begins with the token that ends a text, or begins one, or else
    with any token. A row goes on after the end of a turn or text: in a conversation with the tokens that the template
    puts between two turns, or those of a new conversation; otherwise with what the model writes next.

    Args:
        model: a causal language model. It runs on the device that it is on; afterwards it is as it was.
        tokenizer: the model's tokenizer.
        rows: number of rows.
        length: tokens of a row, including those that it begins with.
        seed: seed of all draws. The same seed gives the same rows on one machine with one version of torch.
        progress: called with the tokens written, and those to write.

    Returns:
        The tokens, int64 (rows, length), on the CPU.

    Raises:
        InputError: a number is out of range, `length` leaves no room after a row's beginning, the model has too few
            positions, or its logits are not finite.
        UnsupportedModel: the model does not predict the next token.
    """
    require_language_model(model, "Writing a text")
    require_weights(model, "Writing a text")
    if rows < 1:
        raise InputError(f"At least one row is needed, but got {rows}.")
    require_positions(model, length, of="A row")
    turns, prefix = turns_of(tokenizer), text_frame(tokenizer)[0]
    begin = (*prefix, *turns.begin) if turns else prefix
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    if not begin and (one := _first_token(tokenizer)) is not None:
        begin = (one,)
    if max(begin, default=0) >= known:
        raise InputError(
            f"The tokenizer begins a text with token {max(begin)}, but the model's vocabulary ends at {known - 1}; use "
            "the tokenizer the model was trained with."
        )
    least = max(len(begin), 1)
    if length <= least:
        raise InputError(
            f"A row must be longer than the {least} tokens that it begins with before the model goes on, but got a "
            f"length of {length} (--sequence-length); choose a longer one."
        )
    draws = torch.Generator().manual_seed(seed)
    at_once, _ = rows_at_once(model, length, model.device)
    written: list[Tensor] = []
    with evaluating(model), plain_generation(model), torch.inference_mode():
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            first_BT = torch.tensor([begin] * count, dtype=torch.int64)
            if not begin:
                first_BT = torch.randint(known, (count, 1), generator=draws)
            done = start * length

            def report(step: int, done: int = done, count: int = count) -> None:
                progress(done + step * count, rows * length)

            sampler = _Sampler(draws, turns, (*prefix,), tokenizer.eos_token_id, known, count, report)
            ids_BT = model.generate(  # type: ignore[operator]
                first_BT.to(model.device),
                attention_mask=torch.ones_like(first_BT).to(model.device),
                max_length=length,
                do_sample=False,
                pad_token_id=0,
                use_cache=True,
                logits_processor=LogitsProcessorList([sampler]),
                **_growing_cache(model, length),
            )
            written.append(ids_BT.cpu())
    # Tensors that were made in inference mode cannot be used in training.
    return torch.cat(written).clone()


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return a token to begin a text with, for a tokenizer that puts nothing before a text.

    It is the token that separates texts, if there is one: the model has learned what follows it.
    """
    for one in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(one, int):
            return one
    return None


def _growing_cache(model: PreTrainedModel, length: int) -> dict[str, Cache]:
    """Return a cache with room for whole rows; transformers' own cache would be copied at every step.

    It is for models whose layers all keep every position; other models get the cache that they make themselves.
    """
    supports: Any = getattr(model, "_supports_default_dynamic_cache", lambda: False)
    if not supports():
        return {}
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [_GrowingLayer(length) for _ in cache.layers]
    return {"past_key_values": cache}


class _GrowingLayer(DynamicLayer):
    """A cache layer with transformers' interface whose `keys` and `values` are views of longer tensors."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room = {"keys": Room(), "values": Room()}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new positions; return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, _ = self._room["keys"].append(self.keys, key_states, self._length)
        self.values, _ = self._room["values"].append(self.values, value_states, self._length)
        return self.keys, self.values


class _Sampler(LogitsProcessor):
    """Draws each row's next token, or takes the template's; all other tokens get a score of −∞.

    So greedy decoding finds the token, and the process's own random state is not used.
    """

    def __init__(
        self,
        draws: torch.Generator,
        turns: Turns | None,
        prefix: tuple[int, ...],
        end: int | None,
        known: int,
        rows: int,
        progress: Callable[[int], None],
    ) -> None:
        self._draws = draws
        self._turns = turns
        self._fresh = () if turns is None else (*prefix, *turns.begin)
        self._end = end
        self._known = known
        self._progress = progress
        # For each row, the template's tokens that are still to be written, and whether the answer is being written.
        self._waiting: list[list[int]] = [[] for _ in range(rows)]
        self._is_answer = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) that leave one token for each row."""
        logits_BV = scores.float()
        logits_BV[:, self._known :] = -torch.inf
        sums_BV = logits_BV.softmax(-1).cumsum(-1)
        if not bool(sums_BV[:, -1].isfinite().all()):
            raise InputError(
                "The model cannot write text, because its logits are not finite numbers; check its weights, or name a "
                "text."
            )
        drawn_B1 = torch.rand(len(scores), 1, generator=self._draws).to(scores.device)
        next_B = torch.searchsorted(sums_BV, drawn_B1 * sums_BV[:, -1:], right=True).squeeze(-1)
        next_B = next_B.clamp(max=self._known - 1)
        if self._turns is not None:
            chosen = [self._led(row, token) for row, token in enumerate(next_B.tolist())]
            next_B = torch.tensor(chosen, device=scores.device)
        self._progress(input_ids.shape[1] + 1)
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, next_B[:, None], 0.0)

    def _led(self, row: int, token: int) -> int:
        """Return the next token of a conversation: the template's while it has tokens left, else the one drawn."""
        assert self._turns is not None
        if self._waiting[row]:
            return self._waiting[row].pop(0)
        between = self._turns.again if self._is_answer[row] else self._turns.answer
        if between and token == between[0]:
            self._waiting[row] = [*between[1:]]
            self._is_answer[row] = not self._is_answer[row]
        elif token == self._end:
            self._waiting[row] = [*self._fresh]
            self._is_answer[row] = False
        return token
