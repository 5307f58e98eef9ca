"""Language models as functions of plain tensors, for exporters.

Dimensions: B texts, T new tokens, P tokens before, S = P + T, V vocabulary; G key/value heads and E their width, each
layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from deadhead.errors import UnsupportedModel
from deadhead.export.all_attention_graph import FlatAllAttention, cache_of
from deadhead.export.flat_model import CacheTensor, FlatModel
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.pruned.structure import emptied

_KINDS = ("key", "value")


def flat_model(model: PreTrainedModel) -> FlatModel:
    """Return a model with its cache as tensors.

    Raises:
        UnsupportedModel: it is no language model with such a cache.
    """
    if not model.can_generate():
        raise UnsupportedModel(
            f"A language model that continues texts was expected, but {type(model).__name__} does not; only such are "
            "exported."
        )
    if isinstance(model, AllAttentionForCausalLM):
        return FlatAllAttention(model, cache_of(model))
    return _FlatHuggingFace(model, _cache_of(model))


@torch.no_grad()
def _cache_of(model: PreTrainedModel) -> list[CacheTensor]:
    """Return the cache's tensors, by running the model once."""
    cache = DynamicCache(config=model.config)
    empty = {getattr(module, "layer_idx", None) for module in emptied(model).values()}
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    found: list[CacheTensor] = []
    for index, layer in enumerate(cache.layers):
        tensors = getattr(layer, "keys", None), getattr(layer, "values", None)
        if any(not isinstance(tensor, Tensor) or tensor.ndim != 4 for tensor in tensors):
            kind = type(layer).__name__
            raise UnsupportedModel(
                f"Layer {index} of this model keeps a {kind}, not keys and values; such models are not exported."
            )
        if index not in empty:
            found += [
                CacheTensor(index, kind, tensor.shape[1], tensor.shape[3])  # type: ignore[union-attr]
                for kind, tensor in zip(_KINDS, tensors, strict=True)
            ]
    return found


class _GivenCache(Cache):
    """A cache of given tensors, which keeps the longer ones in `present`."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]], length: Any, num_layers: int) -> None:
        super().__init__(layers=[])
        self.past, self.length, self.num_layers = past, length, num_layers
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.past:
            return key_states, value_states
        keys, values = self.past[layer_idx]
        self.present[layer_idx] = (torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2))
        return self.present[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    def __len__(self) -> int:
        return self.num_layers


class _FlatHuggingFace(FlatModel):
    """A model of transformers; it is given its mask whole, so that none is made in a way that cannot be traced."""

    def __init__(self, model: PreTrainedModel, cache: Sequence[CacheTensor]) -> None:
        super().__init__(model, cache)
        config: Any = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:
            kinds = {"full_attention" if self.window is None else "sliding_attention"}
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(
                f"This model has layers of type {sorted(unknown)[0]}, and only full and sliding attention are exported."
            )
        self.kinds = sorted(kinds)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        new = input_ids.shape[1]
        before = attention_mask.shape[1] - new
        masks = {kind: self._mask(attention_mask, before, new, kind) for kind in self.kinds}
        pairs = {
            tensor.layer: (past[index], past[index + 1])
            for index, tensor in enumerate(self.cache)
            if tensor.kind == _KINDS[0]
        }
        cache = _GivenCache(pairs, before, self.num_layers)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=masks if len(masks) > 1 else masks[self.kinds[0]],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        present = [cache.present[tensor.layer][_KINDS.index(tensor.kind)] for tensor in self.cache]
        return (logits.float(), *present)

    def _mask(self, attention_mask: Tensor, before: int, new: int, kind: str) -> Tensor:
        """Return what is added to the scores, (B, 1, T, S)."""
        column_S = torch.arange(before + new, device=attention_mask.device)
        row_T1 = torch.arange(new, device=attention_mask.device)[:, None] + before
        seen = column_S <= row_T1
        if kind == "sliding_attention":
            assert self.window is not None
            seen = seen & (row_T1 - column_S < self.window)
        seen = seen[None, None] & attention_mask.bool()[:, None, None, :]
        zero = torch.zeros((), dtype=self.model.dtype, device=attention_mask.device)
        return torch.where(seen, zero, torch.finfo(self.model.dtype).min)
