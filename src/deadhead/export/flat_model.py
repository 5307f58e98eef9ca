"""The form that models are exported in: a function of plain tensors, with the cache going in and coming out.

Dimensions: B texts, T new tokens, P tokens before, S = P + T, V vocabulary; G key/value heads and E their width, each
layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of a layer's cache, (B, G, P, E); its kind is "key" or "value"."""

    layer: int
    kind: str
    heads: int
    width: int

    @property
    def past_name(self) -> str:
        """Its name as an input."""
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def present_name(self) -> str:
        """Its name as an output, once the new tokens have joined it."""
        return f"present.{self.layer}.{self.kind}"


class FlatModel(nn.Module):
    """A language model with its cache as tensors, of layers that have heads only."""

    def __init__(self, model: PreTrainedModel, cache: Sequence[CacheTensor]) -> None:
        super().__init__()
        self.model = model
        self.cache = tuple(cache)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits (B, T, V) and the cache with the new tokens.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 where a position is padding.
            position_ids: (B, T).
            past: `cache`'s tensors.
        """
        raise NotImplementedError
