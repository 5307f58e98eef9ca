"""Attention of a few queries, as in generation. For evaluation on a CPU.

Imports torch only. Dimensions: B batch, T queries, S context positions, H heads, E head width, N persistent vectors,
R = B · T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .attention import Operands

# Rows up to which one softmax in memory is faster than the fused kernel, which is made for many.
_MOST_QUERIES = 32


def is_few(operands: Operands) -> bool:
    """Tell whether `few_attention` is the fastest for these queries."""
    batch, _, num_queries, _ = operands.q_BHTE.shape
    return batch * num_queries <= _MOST_QUERIES


def few_attention(operands: Operands) -> Tensor:
    """Attend without dropout, in one softmax over all scores, which are few. Returns (B, T, H, E)."""
    batch, heads, num_queries, width = operands.q_BHTE.shape
    num_persistent, num_context = operands.persistent_k_HNE.shape[1], operands.k_BHSE.shape[2]
    q_HRE = operands.persistent_q_BHTE.transpose(0, 1).reshape(heads, -1, width)
    persistent_HRN = torch.bmm(operands.persistent_k_HNE, q_HRE.transpose(1, 2)).transpose(1, 2)
    context_BHTS = torch.matmul(operands.content_q_BHTE * operands.scale, operands.k_BHSE.transpose(-1, -2))
    context_BHTS = context_BHTS + operands.context_bias()
    context_HRS = context_BHTS.transpose(0, 1).reshape(heads, -1, num_context)
    weights = functional.softmax(torch.cat([context_HRS, persistent_HRN], dim=-1), dim=-1)
    attended_HRE = torch.bmm(weights[..., num_context:], operands.persistent_v_HNE) * num_persistent**0.5
    context_BHTS = weights[..., :num_context].unflatten(1, (batch, num_queries)).transpose(0, 1)
    attended_BHTE = torch.matmul(context_BHTS, operands.v_BHSE)
    return (attended_BHTE + attended_HRE.unflatten(1, (batch, num_queries)).transpose(0, 1)).transpose(1, 2)
