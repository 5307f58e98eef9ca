"""One softmax over a sliding window of context and a head's persistent vectors, plainly written.

Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width, N persistent vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ALL = slice(None)


def padding_bias(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of padding (where `padding` is True): so low that its weight is exactly 0.

    Not −inf: without persistent vectors a query that sees padding only would have no weights at all.
    """
    return padding.to(dtype) * (torch.finfo(dtype).min / 2)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What the heads of a layer attend with.

    Scores are ((q + u)·k + (q + v)·r) / √E over the context and q·m^k over the persistent vectors (the √E of the
    paper's √E·m^k cancels), in one softmax; values are the context's and √N·m^v. Gates z multiply exp(score) of
    persistent vectors, above and below the fraction bar: with z = 0 a vector is not in the softmax.

    Queries stand at the last T positions of the context. r, u and v are None with rotary positions, where queries for
    the persistent vectors, which have no position, are those before the rotation: else they are the same tensor.
    """

    q_BHTE: Tensor
    persistent_q_BHTE: Tensor
    k_BHSE: Tensor
    v_BHSE: Tensor
    r_HWE: Tensor | None  # oldest first
    content_bias_HE: Tensor | None  # u
    position_bias_HE: Tensor | None  # v
    persistent_k_HNE: Tensor  # m^k
    persistent_v_HNE: Tensor  # m^v
    persistent_scale: float  # √N, N as in the dense model whatever is left of its vectors
    window: int  # W, positions that a query sees, its own included
    padding_BS: Tensor | None = None  # True where a position of the context is padding
    dropout: float = 0.0  # share of the weights that are dropped
    # Gates of the persistent vectors, (N,), or for each text its own, (B, N); None where all are 1. Only
    # `eager_attention` takes them, and `blocked_attention` where they are (N,) and either 0 or 1.
    z_N: Tensor | None = None

    @property
    def scale(self) -> float:
        """1 / √E."""
        return float(self.q_BHTE.shape[-1] ** -0.5)

    @property
    def content_q_BHTE(self) -> Tensor:
        """Queries that meet the keys of the context: q + u."""
        return self.q_BHTE if self.content_bias_HE is None else self.q_BHTE + self.content_bias_HE[:, None]

    def position_scores(self, texts: slice = _ALL, heads: slice = _ALL, queries: slice = _ALL) -> Tensor:
        """Return (q + v)·r / √E by distance, oldest first, (B, H, T, W), or with rotary positions 0, (1, 1, T, W)."""
        q_BHTE = self.q_BHTE[texts, heads, queries]
        if self.r_HWE is None or self.position_bias_HE is None:
            return q_BHTE.new_zeros((1, 1, q_BHTE.shape[2], self.window))
        batch, num_heads, num_queries, width = q_BHTE.shape
        position_q_BHTE = (q_BHTE + self.position_bias_HE[heads, None]) * self.scale
        # The batch is folded into the rows: a product that broadcasts would copy r for every text.
        q_HRE = position_q_BHTE.transpose(0, 1).reshape(num_heads, batch * num_queries, width)
        scores_HRW = torch.bmm(q_HRE, self.r_HWE[heads].transpose(-1, -2))
        return scores_HRW.unflatten(1, (batch, num_queries)).transpose(0, 1)

    def context_bias(self) -> Tensor:
        """Return what position and padding add to the scores of the context, (B or 1, H or 1, T, S)."""
        bias = band(self.position_scores(), self.k_BHSE.shape[2])
        return bias if self.padding_BS is None else bias + padding_bias(self.padding_BS[:, None, None], bias.dtype)


def band(scores_BHTW: Tensor, num_context: int) -> Tensor:
    """Shift each query's window scores to the context columns they belong to, (B, H, T, S); −inf outside the window.

    Query i of T stands at column S − T + i and sees the W columns up to its own, oldest first. Padding every row with
    T columns and reading the buffer with rows one shorter moves row i right by i: no index tensor, no mask.
    """
    num_queries, window = scores_BHTW.shape[-2:]
    columns = window + num_queries - 1
    if num_queries == 1:
        return scores_BHTW[..., columns - num_context :]
    padded = functional.pad(scores_BHTW, (0, num_queries), value=float("-inf"))
    shifted = padded.flatten(-2)[..., : num_queries * columns].unflatten(-1, (num_queries, columns))
    return shifted[..., columns - num_context :]


def largest_exponent(dtype: torch.dtype) -> float:
    """Return the largest x of which e^x, and its square, are numbers of this precision, and of gates', float32.

    Where the score of a vector that a gate shuts out is higher, its gate's gradient is too small, but a number.
    """
    return math.log(min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)) / 2


def eager_attention(operands: Operands, *, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """Attend, differentiable in every tensor as often as one likes; both parts share a maximum and a denominator.

    Returns:
        attended (B, T, H, E); with `need_weights` the weights (B, H, T, S + N) before dropout, else None.
    """
    batch, heads, num_queries, width = operands.q_BHTE.shape
    num_persistent = operands.persistent_k_HNE.shape[1]
    keys_BHES = operands.k_BHSE.transpose(-1, -2)
    context_BHTS = torch.matmul(operands.content_q_BHTE * operands.scale, keys_BHES) + operands.context_bias()
    q_rows = operands.persistent_q_BHTE.transpose(0, 1).reshape(heads, batch * num_queries, width)
    persistent_HRN = torch.bmm(q_rows, operands.persistent_k_HNE.transpose(-1, -2))

    z_RN = operands.z_N
    if z_RN is not None:
        z_RN = (z_RN if z_RN.ndim == 1 else z_RN.repeat_interleave(num_queries, 0)).to(persistent_HRN.dtype)
    top_HR1 = context_BHTS.detach().amax(-1, keepdim=True).transpose(0, 1).reshape(heads, -1, 1)
    if num_persistent:
        seen_HRN = persistent_HRN.detach()
        seen_HRN = seen_HRN if z_RN is None else seen_HRN.masked_fill(z_RN == 0, -math.inf)
        top_HR1 = torch.maximum(top_HR1, seen_HRN.amax(-1, keepdim=True))
    top_BHT1 = top_HR1.unflatten(1, (batch, num_queries)).transpose(0, 1)
    context_BHTS = (context_BHTS - top_BHT1).exp()
    persistent_HRN = persistent_HRN - top_HR1
    if z_RN is None:
        persistent_HRN = persistent_HRN.exp()
    else:
        persistent_HRN = persistent_HRN.clamp(max=largest_exponent(persistent_HRN.dtype)).exp() * z_RN
    persistent_sum = persistent_HRN.sum(-1, keepdim=True).unflatten(1, (batch, num_queries)).transpose(0, 1)
    total_BHT1 = context_BHTS.sum(-1, keepdim=True) + persistent_sum

    weights = None
    if need_weights:
        # What is returned is what is multiplied, so that it has a gradient.
        persistent_BHTN = persistent_HRN.unflatten(1, (batch, num_queries)).transpose(0, 1)
        weights = torch.cat([context_BHTS, persistent_BHTN], dim=-1) / total_BHT1
        context_BHTS, persistent_BHTN = weights.split([context_BHTS.shape[-1], num_persistent], dim=-1)
        persistent_HRN, total_BHT1 = persistent_BHTN.transpose(0, 1).flatten(1, 2), torch.ones_like(total_BHT1)
    if operands.dropout:
        context_BHTS = functional.dropout(context_BHTS, operands.dropout)
        persistent_HRN = functional.dropout(persistent_HRN, operands.dropout)
    from_persistent = torch.bmm(persistent_HRN, operands.persistent_v_HNE * operands.persistent_scale)
    attended = torch.matmul(context_BHTS, operands.v_BHSE)
    attended = attended + from_persistent.unflatten(1, (batch, num_queries)).transpose(0, 1)
    return (attended / total_BHT1).transpose(1, 2), weights


def sdpa_attention(operands: Operands) -> Tensor:
    """Compute the same through PyTorch's fused attention, keys and values concatenated. Returns (B, T, H, E).

    u·k is the same for all queries, so it goes into the additive bias and one query serves both parts. Rotated queries
    serve the context only: both kinds of queries then lie side by side, with zeros opposite them in the keys.
    """
    q_BHTE, k_BHSE = operands.q_BHTE, operands.k_BHSE
    batch, _, _, width = q_BHTE.shape
    num_persistent = operands.persistent_k_HNE.shape[1]
    bias_BHTS = operands.context_bias()
    if operands.content_bias_HE is not None:
        content = torch.matmul(k_BHSE, operands.content_bias_HE[:, :, None]) * operands.scale
        bias_BHTS = bias_BHTS + content.transpose(-1, -2)
    bias = functional.pad(bias_BHTS, (num_persistent, 0)).expand(batch, -1, -1, -1)
    persistent_k_HNE = operands.persistent_k_HNE * width**0.5
    if operands.persistent_q_BHTE is not q_BHTE:
        q_BHTE = torch.cat([q_BHTE, operands.persistent_q_BHTE], dim=-1)
        k_BHSE, persistent_k_HNE = functional.pad(k_BHSE, (0, width)), functional.pad(persistent_k_HNE, (width, 0))
    persistent_v_HNE = operands.persistent_v_HNE * operands.persistent_scale
    keys = torch.cat([persistent_k_HNE.expand(batch, -1, -1, -1), k_BHSE], dim=2)
    values = torch.cat([persistent_v_HNE.expand(batch, -1, -1, -1), operands.v_BHSE], dim=2)
    attended = functional.scaled_dot_product_attention(
        q_BHTE, keys, values, attn_mask=bias, dropout_p=operands.dropout, scale=operands.scale
    )
    return attended.transpose(1, 2)
