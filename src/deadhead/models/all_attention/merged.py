"""The same attention as two calls of PyTorch's fused CPU kernel, merged by their log-sum-exp. For evaluation.

Imports torch only. Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width,
N persistent vectors; of a block n texts, h heads, t queries, c = W + t − 1 columns.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from .attention import Operands, padding_bias
from .blocks import Blocking, by_distance

# The kernel behind `scaled_dot_product_attention` on a CPU; it also returns the log-sum-exp that merging needs.
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Numbers in the buffer of position scores.
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

    Position scores are written through a view by distance into a buffer that is −inf outside the window: nothing is
    shifted, and nothing masked but padding.
    """
    content_q_BHTE, window = operands.content_q_BHTE, operands.window
    batch, heads, num_queries, _ = content_q_BHTE.shape
    blocking = Blocking(
        heads=heads,
        batch=batch,
        queries=num_queries,
        context=operands.k_BHSE.shape[2],
        window=window,
        others=0,
        capacity=_CAPACITY,
    )
    attended_BHTE = torch.empty_like(content_q_BHTE)
    lse_BHT = content_q_BHTE.new_empty((batch, heads, num_queries))
    for block in blocking:
        h, n, t = block.shape
        bias = _buffers.outside_filled((n, h, t, block.columns), content_q_BHTE)
        by_distance(bias, window).copy_(operands.position_scores(block.texts, block.heads, block.queries))
        seen = bias[..., block.num_missing :]
        if operands.padding_BS is not None:
            seen.add_(padding_bias(operands.padding_BS[block.texts, None, None, block.context], seen.dtype))
        part = (block.texts, block.heads, block.queries)
        attended_BHTE[part], lse_BHT[part] = _flash(
            _with_rows(content_q_BHTE[part]),
            _with_rows(operands.k_BHSE[block.texts, block.heads, block.context]),
            _with_rows(operands.v_BHSE[block.texts, block.heads, block.context]),
            0.0,
            False,
            attn_mask=seen,
            scale=operands.scale,
        )
    return attended_BHTE, lse_BHT


class _Buffers(threading.local):
    """Memory for the position scores of a block, used by one layer after the other, each thread with its own.

    Blocks of as many queries and columns all write the same places, so that the others are filled with −inf only once.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def outside_filled(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        """Return a tensor (n, h, t, c) that is −inf wherever nothing is written by distance."""
        n, h, *rest = shape
        last = self.last
        if last is None or list(last.shape[1:]) != rest or len(last) < n * h or last.dtype != like.dtype:
            # One made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self.last = last = torch.full((n * h, *rest), -math.inf, dtype=like.dtype, device=like.device)
        return last[: n * h].view(shape)


_buffers = _Buffers()


def _with_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous, which the kernel takes for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
