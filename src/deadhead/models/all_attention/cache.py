"""Keys and values of the positions before, appended in place.

Dimensions: B batch, T new positions, S kept positions, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer


def append_in_place(cache: Cache) -> None:
    """Let an empty cache append to memory that has room, where transformers' own would copy all for every token."""
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            appending = AppendingLayer(layer.sliding_window)
            appending.record_past = layer.record_past
            cache.layers[index] = appending


class AppendingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding layer, the same to its users; `keys` and `values` are views of longer tensors."""

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window, **kwargs)
        self._room = {"keys": Room(), "values": Room()}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, E) of each; return what the new positions may see, (B, H, S + T, E) of each."""
        if self.record_past or torch.is_grad_enabled():
            # To be rolled back, or differentiated perhaps: neither goes with writing over what was there.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keep = self.sliding_window - 1
        self.keys, keys = self._room["keys"].append(self.keys, key_states, keep)
        self.values, values = self._room["values"].append(self.values, value_states, keep)
        return keys, values


class Room:
    """A tensor with room behind the positions that are kept in it."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.kept: Tensor | None = None
        self.end = 0

    def append(self, current: Tensor | None, new: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Write `new` behind `current`; return the last `keep` positions of both, and both."""
        length, count = (current.shape[-2] if current is not None and current.numel() else 0), new.shape[-2]
        # The cache may have put other tensors in place: other beams, other rows of the batch, a shorter text.
        if self.memory is None or current is not self.kept or self.end + count > self.memory.shape[-2]:
            # A text that is read in inference mode may go on outside of it, where its tensors could not be written to.
            with torch.inference_mode(False):
                self.memory = new.new_empty((*new.shape[:2], length + count + keep, new.shape[3]))
            if current is not None and length:
                self.memory[:, :, :length] = current
            self.end = length
        self.memory[:, :, self.end : self.end + count] = new
        self.end += count
        both = self.memory[:, :, self.end - count - length : self.end]
        self.kept = both[:, :, -keep:]
        return self.kept, both
