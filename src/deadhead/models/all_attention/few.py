"""Attention of a few queries, as in generation. For evaluation on a CPU.

Imports torch only. Dimensions: B batch, T queries, S context positions, H heads, E head width, N persistent vectors,
R = B · T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .attention import Operands

# B · T up to which one softmax in memory is faster than the fused kernel, which is made for many.
MOST_QUERIES = 32


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
