"""The All-attention Transformer, and Transformer-XL, written from its equations as one function of plain tensors.

The model's own attention chooses among several ways by what it is given; a graph has one. It looks at the last M
positions of the cache only. Here S is M + T, the columns that the new tokens can see together; other dimensions as in
`deadhead.models.all_attention.modeling`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deadhead.export.flat_model import CacheTensor, FlatModel
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.all_attention.adaptive import AdaptiveEmbedding
from deadhead.models.all_attention.positions import rotate_at


def cache_of(model: AllAttentionForCausalLM) -> list[CacheTensor]:
    """Return the cache's tensors."""
    config = model.config
    counts = [len(config.layer_heads(layer)) for layer in range(config.num_hidden_layers)]
    return [
        CacheTensor(layer, kind, count, config.head_dim)
        for layer, count in enumerate(counts)
        if count
        for kind in ("key", "value")
    ]


class FlatAllAttention(FlatModel):
    """See `FlatModel`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits and the cache."""
        model: Any = self.model.model
        config = self.model.config
        new, memory = input_ids.shape[1], config.memory_length
        before = past[0].shape[2] if past else attention_mask.shape[1] - new
        hidden = _embed(model.embed_tokens, input_ids) * config.hidden_size**0.5
        # The last M + T columns, and where no token stands, those before the first token included.
        absent_BS = functional.pad(attention_mask[:, -(before + new) :] == 0, (memory, 0), value=True)[:, before:]
        column_S = torch.arange(memory + new, device=input_ids.device)
        distance_TS = torch.arange(new, device=input_ids.device)[:, None] + memory - column_S
        in_window_TS = (distance_TS >= 0) & (distance_TS <= memory)
        shared = (model.content_bias, model.position_bias) if hasattr(model, "content_bias") else None
        table_WD = model._positions(hidden)
        given, present = iter(past), []
        for layer in model.layers:
            attention = layer.attention
            normed = layer.norm(hidden)
            if not attention.heads:
                hidden = layer.feed_forward(hidden + attention.o_proj(normed))
                continue
            keys, values = (
                self._heads(attention, projection, normed) for projection in (attention.k_proj, attention.v_proj)
            )
            queries = self._heads(attention, attention.q_proj, normed)
            plain_queries = queries
            if attention.is_rotary:
                queries, keys = (rotate_at(tensor, position_ids[:, None]) for tensor in (queries, keys))
            keys, values = torch.cat([next(given), keys], dim=2), torch.cat([next(given), values], dim=2)
            present += [keys, values]
            keys, values = (functional.pad(tensor, (0, 0, memory, 0))[:, :, before:] for tensor in (keys, values))
            hidden_columns_BS = absent_BS
            if config.attend_initial_memory:
                keys, values = self._with_blanks(layer, keys, values, absent_BS, position_ids)
                hidden_columns_BS = torch.zeros_like(absent_BS)
            seen = in_window_TS & ~hidden_columns_BS[:, None, None, :]
            attended = self._attend(
                attention, queries, plain_queries, keys, values, table_WD, shared, distance_TS, seen
            )
            hidden = layer.feed_forward(hidden + attention.o_proj(attended))
        logits = self.model.lm_head(model.norm(hidden))
        return (logits.float(), *present)

    @staticmethod
    def _heads(attention: Any, projection: Any, hidden: Tensor) -> Tensor:
        return projection(hidden).unflatten(-1, (len(attention.heads), attention.head_dim)).transpose(1, 2)

    def _with_blanks(
        self, layer: Any, keys: Tensor, values: Tensor, absent_BS: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let a zero hidden state stand in every column without a token."""
        attention = layer.attention
        blank = layer.norm(torch.zeros_like(layer.norm.weight))[None, None]
        blank_k = self._heads(attention, attention.k_proj, blank)
        blank_v = self._heads(attention, attention.v_proj, blank)
        if attention.is_rotary:
            columns = keys.shape[2]
            places = position_ids[:, -1:] - (columns - 1) + torch.arange(columns, device=keys.device)
            blank_k = rotate_at(blank_k.expand(-1, -1, columns, -1), places[:, None])
        absent = absent_BS[:, None, :, None]
        return torch.where(absent, blank_k, keys), torch.where(absent, blank_v, values)

    @staticmethod
    def _attend(
        attention: Any,
        queries: Tensor,
        plain_queries: Tensor,
        keys: Tensor,
        values: Tensor,
        table_WD: Tensor | None,
        shared: tuple[Tensor, Tensor] | None,
        distance_TS: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Return what the output projection gets, (B, T, H · E)."""
        scale, content_queries = attention.head_dim**-0.5, queries
        position: Tensor | None = None
        if table_WD is not None:
            u, v = (bias[:, None] for bias in attention._biases(shared))
            content_queries = queries + u
            r_HWE = FlatAllAttention._heads(attention, attention.r_proj, table_WD[None])[0]
            by_distance = torch.matmul(queries + v, r_HWE.transpose(-1, -2))
            # The table's last row is distance 0.
            rows = (table_WD.shape[0] - 1 - distance_TS).clamp(0, table_WD.shape[0] - 1)
            position = by_distance.gather(-1, rows.expand(*by_distance.shape[:2], -1, -1))
        scores = torch.matmul(content_queries, keys.transpose(-1, -2))
        scores = (scores if position is None else scores + position) * scale
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        count = attention.num_persistent
        if count:
            persistent = torch.matmul(plain_queries, attention.persistent_k.transpose(-1, -2))
            weights = torch.cat([scores, persistent], dim=-1).softmax(-1)
            context_weights = weights[..., :-count]
            mixed = torch.matmul(weights[..., -count:], attention.persistent_v * attention.persistent_scale)
            attended = torch.matmul(context_weights, values) + mixed
        else:
            attended = torch.matmul(scores.softmax(-1), values)
        return attended.transpose(1, 2).flatten(-2)


def _embed(embedding: Any, input_ids: Tensor) -> Tensor:
    """Look up every word in every band, where the model itself looks only into the band that it is in."""
    if not isinstance(embedding, AdaptiveEmbedding):
        hidden: Tensor = embedding(input_ids)
        return hidden
    parts = []
    for (start, stop), table, projection in zip(embedding.bands, embedding.tables, embedding.projections, strict=True):
        is_here = (input_ids >= start) & (input_ids < stop)
        found = projection(table((input_ids - start).clamp(0, stop - start - 1)))
        parts.append(torch.where(is_here[..., None], found, 0.0))
    return torch.stack(parts).sum(0)
