"""The numbers that say what a model costs. They need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a model with some of its heads, and hidden units.

    Args:
        heads: heads left, one number a layer; key/value groups where the model has them and was not cut by heads.
        total_heads: heads of the original dense model, one number a layer.
        parameters: all parameters, shared tensors counted once.
        embedding_parameters: those of embeddings and output layer.
        attention_parameters: those that belong to heads and go with them.
        flops_per_token: of one forward pass over a token at the given length; a multiply-add counts as 2. Norms,
            softmax and the once-per-pass projection of relative positions are not counted.
        attention_flops_per_token: the heads' part of it.
        kv_cache_bytes: cache of one text at the given length, in the model's precision; 0 where the model keeps none.
        hidden_units: hidden units, or persistent vectors, left, one number a layer that has any.
        total_hidden_units: those of the original dense model, one number a layer that has any.
        hidden_parameters: those that belong to hidden units and go with them.
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
