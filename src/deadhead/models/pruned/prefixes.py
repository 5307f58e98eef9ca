"""Keys and values that were made for the dense model's heads, as PEFT's prefix tuning makes them, for a cut model."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from .shrinking import heads_of
from .structure import config_head_names


def keep_own_heads(config: Any, cache: Any) -> None:
    """Take out of a cache, in place, what belongs to heads that a cut model no longer has.

    PEFT learns a prefix of as many heads as the configuration has, the dense model's, for each layer. So a prefix that
    was learned with the dense model goes on with the cut one.

    Args:
        config: of the cut model.
        cache: what its `forward` is given; layers of other numbers of heads than the dense model's are its own.
    """
    if not isinstance(cache, Cache):
        return
    numbers = {is_kv: getattr(config, name) for name, is_kv in config_head_names(config)}
    num_heads = numbers[False]
    num_kv_heads = numbers.get(True, num_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    plan = config.head_plan
    for key, kept in plan["kept"].items():
        layer: Any = cache.layers[int(key)] if int(key) < len(cache.layers) else None
        keys = getattr(layer, "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[1] != num_kv_heads or keys.shape[-1] != head_dim:
            continue
        heads = list(heads_of(plan["unit"], kept, num_heads, num_kv_heads).kv)
        if not heads:
            # What an emptied layer keeps: one number a position.
            layer.keys = layer.values = keys.new_zeros((keys.shape[0], 1, keys.shape[2], 1))
        elif len(heads) != num_kv_heads:
            layer.keys, layer.values = keys[:, heads], layer.values[:, heads]
