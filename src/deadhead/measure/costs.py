"""The numbers that make up a model's cost. This module does without torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs with the heads and hidden units that it has left.

    Args:
        heads: heads left in each layer, or key/value groups if the model has them and was not cut by heads.
        total_heads: heads, or groups, of each layer in the original dense model.
        parameters: all parameters; shared tensors count once.
        embedding_parameters: parameters of the embeddings and the output layer.
        attention_parameters: parameters that belong to heads and go with them.
        flops_per_token: FLOPs of one forward pass for a token at the given length; a multiply-add counts as 2. Norms,
            softmax and the once-per-pass projection of relative positions are not counted.
        attention_flops_per_token: the heads' part of `flops_per_token`.
        kv_cache_bytes: bytes of the cache of one text at the given length, in the model's precision; 0 if the model
            keeps none.
        hidden_units: hidden units, or persistent vectors, left in each layer that has any.
        total_hidden_units: hidden units, or persistent vectors, of each such layer in the original dense model.
        hidden_parameters: parameters that belong to hidden units and go with them.
    """

    heads: list[int]
    total_heads: list[int]
    parameters: int
    embedding_parameters: int
    attention_parameters: int
    flops_per_token: float
    attention_flops_per_token: float
    kv_cache_bytes: int
    hidden_units: list[int] = field(default_factory=list)
    total_hidden_units: list[int] = field(default_factory=list)
    hidden_parameters: int = 0
