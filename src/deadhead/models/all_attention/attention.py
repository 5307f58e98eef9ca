"""One softmax over a sliding window of context and a head's persistent vectors. Imports torch only.

Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width, N persistent vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def band(scores_BHTW: Tensor, num_context: int) -> Tensor:
    """Shift each query's window scores to the context columns they belong to; −inf outside the window.

    Query i of T stands at column S − T + i and sees the W columns up to its own, oldest first. Padding every row with
    T columns and reading the buffer with rows one shorter moves row i right by i: no index tensor, no mask.

    Args:
        scores_BHTW: scores by distance, oldest position first.
        num_context: S; if it is below W + T − 1, the columns before the first position are left out.

    Returns:
        (B, H, T, S)
    """
    num_queries, window = scores_BHTW.shape[-2:]
    columns = window + num_queries - 1
    padded = functional.pad(scores_BHTW, (0, num_queries), value=float("-inf"))
    shifted = padded.flatten(-2)[..., : num_queries * columns].unflatten(-1, (num_queries, columns))
    return shifted[..., columns - num_context :]


def eager_attention(
    q_BHTE: Tensor,
    persistent_q_BHTE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    bias_BHTS: Tensor,
    persistent_k_HNE: Tensor,
    persistent_v_HNE: Tensor,
    *,
    content_bias_HE: Tensor | None,
    dropout: float,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend to context and persistent vectors in one softmax, differentiable in every argument.

    Scores are ((q + u)·k + bias·√E) / √E over the context and q·m^k over the persistent vectors (the √E of the
    paper's √E·m^k cancels); values are v and √N·m^v. The persistent vectors have no position, so with rotary positions
    they get the queries as they were before the rotation. The two parts are exponentiated under a common maximum and
    share one denominator, which spares concatenating keys, values and scores; the persistent part folds the batch
    into its rows.

    Returns:
        attended (B, H, T, E); with `need_weights` the weights (B, H, T, S + N) before dropout, else None.
    """
    batch, heads, num_queries, width = q_BHTE.shape
    num_persistent = persistent_k_HNE.shape[1]
    content_q = q_BHTE if content_bias_HE is None else q_BHTE + content_bias_HE[:, None]
    context_BHTS = torch.matmul(content_q * width**-0.5, k_BHSE.transpose(-1, -2)) + bias_BHTS
    q_rows = persistent_q_BHTE.transpose(0, 1).reshape(heads, batch * num_queries, width)
    persistent_HRN = torch.bmm(q_rows, persistent_k_HNE.transpose(-1, -2))

    top_HR1 = context_BHTS.detach().amax(-1, keepdim=True).transpose(0, 1).reshape(heads, -1, 1)
    top_HR1 = torch.maximum(top_HR1, persistent_HRN.detach().amax(-1, keepdim=True))
    top_BHT1 = top_HR1.unflatten(1, (batch, num_queries)).transpose(0, 1)
    context_BHTS = (context_BHTS - top_BHT1).exp()
    persistent_HRN = (persistent_HRN - top_HR1).exp()
    persistent_sum = persistent_HRN.sum(-1, keepdim=True).unflatten(1, (batch, num_queries)).transpose(0, 1)
    total_BHT1 = context_BHTS.sum(-1, keepdim=True) + persistent_sum

    weights = None
    if need_weights:
        persistent_BHTN = persistent_HRN.unflatten(1, (batch, num_queries)).transpose(0, 1)
        weights = torch.cat([context_BHTS, persistent_BHTN], dim=-1) / total_BHT1
    if dropout:
        context_BHTS = functional.dropout(context_BHTS, dropout)
        persistent_HRN = functional.dropout(persistent_HRN, dropout)
    from_persistent = torch.bmm(persistent_HRN, persistent_v_HNE * num_persistent**0.5)
    attended = torch.matmul(context_BHTS, v_BHSE)
    attended = attended + from_persistent.unflatten(1, (batch, num_queries)).transpose(0, 1)
    return attended / total_BHT1, weights


def sdpa_attention(
    q_BHTE: Tensor,
    persistent_q_BHTE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    bias_BHTS: Tensor,
    persistent_k_HNE: Tensor,
    persistent_v_HNE: Tensor,
    *,
    content_bias_HE: Tensor | None,
    dropout: float,
) -> Tensor:
    """Compute the same through PyTorch's fused attention, keys and values concatenated. Returns (B, H, T, E).

    u·k is the same for all queries, so it goes into the additive bias and one query serves both parts. Rotated queries
    serve the context only: both kinds of queries then lie side by side, with zeros opposite them in the keys.
    """
    batch, _, _, width = q_BHTE.shape
    num_persistent = persistent_k_HNE.shape[1]
    if content_bias_HE is not None:
        bias_BHTS = bias_BHTS + (torch.matmul(k_BHSE, content_bias_HE[:, :, None]) * width**-0.5).transpose(-1, -2)
    bias = functional.pad(bias_BHTS, (num_persistent, 0)).expand(batch, -1, -1, -1)
    persistent_k_HNE = persistent_k_HNE * width**0.5
    if persistent_q_BHTE is not q_BHTE:
        q_BHTE = torch.cat([q_BHTE, persistent_q_BHTE], dim=-1)
        k_BHSE, persistent_k_HNE = functional.pad(k_BHSE, (0, width)), functional.pad(persistent_k_HNE, (width, 0))
    keys = torch.cat([persistent_k_HNE.expand(batch, -1, -1, -1), k_BHSE], dim=2)
    values = torch.cat([(persistent_v_HNE * num_persistent**0.5).expand(batch, -1, -1, -1), v_BHSE], dim=2)
    return functional.scaled_dot_product_attention(
        q_BHTE, keys, values, attn_mask=bias, dropout_p=dropout, scale=width**-0.5
    )
