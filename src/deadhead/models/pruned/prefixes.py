"""Keys and values that were made for the dense model's heads, as PEFT's prefix tuning makes them, for a cut model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache

from .layer_configs import head_counts, head_width
from .shrinking import heads_of

# An attribute of caches that a cut model has written to, or been given before.
_SEEN = "was_with_a_cut_model"


def keep_own_heads(config: Any, cache: Any) -> None:
    """Take out of a cache that a cut model is given for the first time what belongs to heads that it no longer has.

    PEFT learns a prefix of as many heads as the configuration has, the dense model's, for each layer. So a prefix that
    was learned with the dense model goes on with the cut one, and so does a text that the dense model has read: its
    cache is changed in place.

    Args:
        config: of the cut model.
        cache: what its `forward` is given.
    """
    if not isinstance(cache, Cache) or getattr(cache, _SEEN, False):
        return
    setattr(cache, _SEEN, True)
    if not config.plans_layers:
        return
    counts = head_counts(config)
    width = head_width(config)
    plan = config.head_plan
    for key, kept in plan["kept"].items():
        layer: Any = cache.layers[int(key)] if int(key) < len(cache.layers) else None
        keys = getattr(layer, "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[1] != counts["kv_group"] or keys.shape[-1] != width:
            continue
        heads = list(heads_of(plan["unit"], kept, counts["head"], counts["kv_group"]).kv)
        if not heads:
            # What an emptied layer keeps: one number a position.
            layer.keys = layer.values = keys.new_zeros((keys.shape[0], 1, keys.shape[2], 1))
        elif heads != list(range(counts["kv_group"])):
            layer.keys, layer.values = keys[:, heads], layer.values[:, heads]


def mark_own(output: Any) -> None:
    """Mark the cache among a cut model's outputs as its own: it may look like one of the dense model's."""
    for value in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ():
        if isinstance(value, Cache):
            setattr(value, _SEEN, True)
