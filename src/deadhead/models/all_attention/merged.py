"""The same attention as two calls of PyTorch's fused CPU kernel, merged by their log-sum-exp. For evaluation.

A few queries, as in generation, are attended in one plain softmax.

Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width,
N persistent vectors; of a block n texts, h heads, t queries, c = W + t − 1 columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .attention import Operands, padding_bias
from .blocks import Blocking, by_distance

# The kernel behind `scaled_dot_product_attention` on a CPU; it also returns the log-sum-exp that merging needs.
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# B · T up to which one softmax in memory is faster than the fused kernel, which is made for many.
MOST_QUERIES = 32
# Position scores that are held at a time.
_CAPACITY = 2**20


def merged_attention(operands: Operands) -> Tensor:
    """Attend without gradients and without dropout; nothing has the size B · H · T · (S + N). Returns (B, T, H, E)."""
    context_BHTE, context_BHT = _context(operands)
    batch, heads, num_queries, width = operands.q_BHTE.shape
    if not operands.persistent_k_HNE.shape[1]:
        return context_BHTE.transpose(1, 2)
    # The same vectors for all texts: the batch is folded into the rows of one call.
    q_rows = operands.persistent_q_BHTE.transpose(0, 1).reshape(1, heads, batch * num_queries, width)
    persistent, persistent_lse = _flash(
        _with_rows(q_rows), operands.persistent_k_HNE[None], operands.persistent_v_HNE[None], 0.0, False, scale=1.0
    )
    persistent_BHTE = persistent.view(heads, batch, num_queries, width).transpose(0, 1)
    persistent_BHT = persistent_lse.view(heads, batch, num_queries).transpose(0, 1)
    share_BHT1 = torch.sigmoid(context_BHT - persistent_BHT)[..., None].to(context_BHTE.dtype)
    scaled_BHTE = persistent_BHTE * operands.persistent_scale
    return torch.lerp(scaled_BHTE, context_BHTE, share_BHT1).transpose(1, 2)


def _context(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return what the context alone gives, (B, H, T, E), and its log-sum-exp, (B, H, T).

    Position scores are written through a view by distance into memory that is −inf outside the window: nothing is
    shifted, and nothing masked but padding.
    """
    content_q_BHTE, window = operands.content_q_BHTE, operands.window
    batch, heads, queries, _ = content_q_BHTE.shape
    blocking = Blocking(
        heads=heads, batch=batch, queries=queries, context=operands.k_BHSE.shape[2], window=window, capacity=_CAPACITY
    )
    attended_BHTE = torch.empty_like(content_q_BHTE)
    lse_BHT = content_q_BHTE.new_empty((batch, heads, queries))
    for block in blocking:
        h, n, t = block.shape
        bias = content_q_BHTE.new_full((n, h, t, block.columns), -math.inf)
        by_distance(bias, window).copy_(operands.position_scores(block.texts, block.heads, block.queries))
        seen = bias[..., block.num_missing :]
        if operands.padding_BS is not None:
            seen.add_(padding_bias(operands.padding_BS[block.texts, None, None, block.context], seen.dtype))
        part, context = (block.texts, block.heads, block.queries), (block.texts, block.heads, block.context)
        k, v = _with_rows(operands.k_BHSE[context]), _with_rows(operands.v_BHSE[context])
        attended_BHTE[part], lse_BHT[part] = _flash(
            _with_rows(content_q_BHTE[part]), k, v, 0.0, False, attn_mask=seen, scale=operands.scale
        )
    return attended_BHTE, lse_BHT


def _with_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous, which the kernel takes for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def few_attention(operands: Operands) -> Tensor:
    """Attend without dropout, in one softmax over all scores, which are few. Returns (B, T, H, E).

    As few calls as possible: with a single query each costs as much as a thousand multiply-adds.
    """
    batch, heads, num_queries, width = operands.q_BHTE.shape
    num_context = operands.k_BHSE.shape[2]

    def by_head(tensor_BHTx: Tensor) -> Tensor:
        return tensor_BHTx.transpose(0, 1).reshape(heads, batch * num_queries, -1)

    def by_text(tensor_HRx: Tensor) -> Tensor:
        return tensor_HRx.view(heads, batch, num_queries, -1).transpose(0, 1)

    q_rows = by_head(operands.persistent_q_BHTE)
    persistent_HRN = torch.bmm(operands.persistent_k_HNE, q_rows.transpose(1, 2)).transpose(1, 2)
    content_q = operands.content_q_BHTE.reshape(batch * heads, num_queries, width)
    k = operands.k_BHSE.flatten(0, 1).transpose(1, 2)
    bias = operands.context_bias().expand(batch, heads, -1, -1).reshape(batch * heads, num_queries, num_context)
    context = torch.baddbmm(bias, content_q, k, alpha=operands.scale).view(batch, heads, num_queries, num_context)
    weights = functional.softmax(torch.cat([by_head(context), persistent_HRN], dim=-1), dim=-1)
    weights_BHTS = by_text(weights[..., :num_context]).reshape(batch * heads, num_queries, num_context)
    attended = torch.bmm(weights_BHTS, operands.v_BHSE.flatten(0, 1)).view(batch, heads, num_queries, width)
    persistent_HRN = weights[..., num_context:]
    attended_HRE = torch.baddbmm(
        by_head(attended), persistent_HRN, operands.persistent_v_HNE, alpha=operands.persistent_scale
    )
    return by_text(attended_HRE).transpose(1, 2)
