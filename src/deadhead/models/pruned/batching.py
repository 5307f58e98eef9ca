"""Continuous batching, as `generate_batch` does it, of models whose layers have different numbers of key/value heads.

Transformers' paged cache has one number of key/value heads for all layers, that of the configuration. Here it gets that
of the layer with most, and other layers write zeros to the heads that they do not have.

Dimensions: G key/value heads of a layer, T queries of all texts in a batch, S positions of keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from .shrinking import LayerConfig
from .structure import find_attentions


class BatchedModel(LayerConfig):
    """A model as the manager of batches sees it: with a configuration of its own, in which the heads are `kv_heads`."""

    def __call__(self, *, cache: PagedAttentionCache, **inputs: Any) -> Any:
        """Run the model, in one forward pass, on what the manager has prepared."""
        return self.shared(cache=PaddedCache(cache, self.kv_heads), **inputs)


class PaddedCache(PagedAttentionCache):
    """The paged cache for one forward pass, with rows of `kv_heads` heads whatever number a layer gives it."""

    kv_heads: int

    def __init__(self, cache: PagedAttentionCache, kv_heads: int) -> None:
        # The values are the cache's own, its tensors among them; transformers asks for the class.
        vars(self).update(vars(cache), kv_heads=kv_heads)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values (1, G, T, E), and return those of all positions with the layer's G heads."""
        heads = key_states.shape[1]
        missing = (0, 0, 0, 0, 0, self.kv_heads - heads)
        padded = (functional.pad(states, missing) for states in (key_states, value_states))
        keys, values = super().update(*padded, *args, **kwargs)
        # Heads are in dimension 1 of (1, G, S, E), and of the (S, G, E) that transformers before 5.20 returns.
        return keys[:, :heads], values[:, :heads]


def pad_layers(manager: ContinuousBatchingManager, model: PreTrainedModel) -> None:
    """Let a manager of batches, before it has made its cache, run a model whose layers differ."""
    if isinstance(manager.model, BatchedModel):
        return
    kv_heads = {attention.num_kv_heads for attention in find_attentions(model)[0]}
    most = max(kv_heads, default=1)
    config = LayerConfig(model.config.get_text_config(), {"num_key_value_heads": most})
    config.own["get_text_config"] = lambda: config
    manager.model = BatchedModel(model, {"config": config, "kv_heads": most})  # type: ignore[assignment]
    if len(kv_heads) > 1:
        # FlashAttention's kernel for steps of one token writes to the cache itself, all heads of it.
        manager.continuous_batching_config.max_blocks_per_request = 0
