"""The same attention a block at a time, with a backward pass of its own: exact, and near the speed of its products.

A plain softmax over B × H × T × (S + N) scores spends more time on fresh memory, dropout and copies than on products,
and keeps several tensors of that size for the backward pass. Here scores live in one small buffer that is used again
and again: a block is scored, exponentiated, dropped out and multiplied by the values while it is in the cache, and
scored again in the backward pass. Of that size only dropout's choices are kept, a byte for each weight.

Imports torch only. Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width,
N persistent vectors; of a block n texts, t queries, c = W + t − 1 columns, R = n · t rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Operands
from .blocks import Block, Blocking, by_distance

# Scores in a block: a few MB. Smaller blocks lose more to the many calls, larger ones more to memory.
_CAPACITY = 2**21
# Values of a random byte, which decides about one weight's dropout.
_LEVELS = 256
# Tensors of a call that may need gradients, in the order of the arguments.
_NAMES = ("q", "persistent_q", "k", "v", "r", "content_bias", "position_bias", "persistent_k", "persistent_v")


def blocked_attention(operands: Operands) -> Tensor:
    """Attend; differentiable once, in every tensor. Returns (B, T, H, E)."""

    # Inside, everything has the queries' precision: what autocast would do with each product, done once.
    def like_q(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(operands.q_BHTE.dtype)

    with torch.autocast(operands.q_BHTE.device.type, enabled=False):
        attended: Tensor = _BlockedAttention.apply(
            operands.q_BHTE,
            None if operands.persistent_q_BHTE is operands.q_BHTE else operands.persistent_q_BHTE,
            like_q(operands.k_BHSE),
            like_q(operands.v_BHSE),
            like_q(operands.r_HWE),
            like_q(operands.content_bias_HE),
            like_q(operands.position_bias_HE),
            like_q(operands.persistent_k_HNE),
            like_q(operands.persistent_v_HNE),
            operands.padding_BS,
            operands.window,
            operands.dropout,
        )
    return attended


@dataclass(frozen=True)
class _Part:
    """One head's scores or weights of a block, as views of one buffer."""

    whole_ntx: Tensor  # all columns: context, then persistent
    context_ntc: Tensor
    seen_nts: Tensor  # the columns of the context that exist
    window_ntw: Tensor  # the context by distance
    persistent_RN: Tensor


@dataclass(frozen=True)
class _Queries:
    """One head's queries of a block."""

    content_nte: Tensor
    position_RE: Tensor | None
    persistent_RE: Tensor


class _Work:
    """One call's operands, block by block."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.batch, self.heads, self.num_queries, self.width = operands.q_BHTE.shape
        self.blocking = Blocking(
            batch=self.batch,
            queries=self.num_queries,
            context=operands.k_BHSE.shape[2],
            window=operands.window,
            others=operands.persistent_k_HNE.shape[1],
            capacity=_CAPACITY,
        )

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        for head in range(self.heads):
            for block in self.blocking:
                yield head, block

    def buffer(self) -> Tensor:
        """Return memory for the scores of a block."""
        return self.operands.q_BHTE.new_empty(self.blocking.size)

    def empty(self, length: int) -> Tensor:
        """Return (B, H, length, E) without values, laid out as (B, length, H, E), as the projections are."""
        return self.operands.q_BHTE.new_empty((self.batch, length, self.heads, self.width)).transpose(1, 2)

    def part(self, buffer: Tensor, block: Block) -> _Part:
        """View the buffer as scores of a block."""
        row = block.columns + self.blocking.others
        shape = (block.num_texts, block.num_queries, row)
        whole = buffer[: math.prod(shape)].view(shape)
        context = whole[..., : block.columns]
        return _Part(
            whole,
            context,
            context[..., block.num_missing :],
            by_distance(context, self.operands.window),
            whole.flatten(0, 1)[:, block.columns :],
        )

    def queries(self, head: int, block: Block) -> _Queries:
        """Return the three kinds of queries: scaled q + u, scaled q + v, and q."""
        operands = self.operands
        q_nte = operands.q_BHTE[block.texts, head, block.queries]
        content_nte, position_nte = q_nte, None
        if operands.content_bias_HE is not None and operands.position_bias_HE is not None:
            content_nte = q_nte + operands.content_bias_HE[head]
            position_nte = (q_nte + operands.position_bias_HE[head]).mul_(operands.scale).flatten(0, 1)
        persistent_RE = operands.persistent_q_BHTE[block.texts, head, block.queries].flatten(0, 1)
        return _Queries(content_nte * operands.scale, position_nte, persistent_RE)

    def weights(self, buffer: Tensor, head: int, block: Block) -> tuple[_Part, _Queries]:
        """Return the attention weights of a block, before dropout, in `buffer`."""
        operands = self.operands
        part, queries = self.part(buffer, block), self.queries(head, block)
        part.context_ntc.fill_(-math.inf)
        if queries.position_RE is None or operands.r_HWE is None:
            part.window_ntw.zero_()
        else:
            position_RW = torch.mm(queries.position_RE, operands.r_HWE[head].T)
            part.window_ntw.copy_(position_RW.view(part.window_ntw.shape))
        part.context_ntc[..., : block.num_missing] = -math.inf
        keys = operands.k_BHSE[block.texts, head, block.context]
        part.seen_nts.baddbmm_(queries.content_nte, keys.transpose(1, 2))
        if operands.padding_BS is not None:
            part.seen_nts.masked_fill_(operands.padding_BS[block.texts, None, block.context], -math.inf)
        torch.mm(queries.persistent_RE, operands.persistent_k_HNE[head].T, out=part.persistent_RN)
        torch.softmax(part.whole_ntx, -1, out=part.whole_ntx)
        return part, queries


class _BlockedAttention(torch.autograd.Function):
    """Forward and backward over all blocks. Gradients are those of a plain softmax with the same dropout."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, padding_BS, window, dropout = arguments
        work = _Work(_operands(tensors, padding_BS, window))
        attended_BHTE = work.empty(work.num_queries)
        scores, floats = work.buffer(), work.buffer() if dropout else None
        root = work.blocking.others**0.5
        kept: list[Tensor] = []
        for head, block in work:
            part, _ = work.weights(scores, head, block)
            if floats is not None:
                kept.append(_kept(part.whole_ntx, dropout))
                part.whole_ntx.mul_(_as_floats(kept[-1], floats))
            sum_nte = torch.mm(part.persistent_RN, work.operands.persistent_v_HNE[head]).mul_(root)
            sum_nte = sum_nte.view(block.num_texts, block.num_queries, work.width)
            sum_nte.baddbmm_(part.seen_nts, work.operands.v_BHSE[block.texts, head, block.context])
            attended_BHTE[block.texts, head, block.queries] = sum_nte
        if dropout:
            attended_BHTE.div_(1 - dropout)
        ctx.save_for_backward(*tensors, padding_BS, *kept)
        ctx.window, ctx.dropout = window, dropout
        return attended_BHTE.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        padding_BS, *kept = saved[len(_NAMES) :]
        work = _Work(_operands(saved[: len(_NAMES)], padding_BS, ctx.window))
        gradients = _Gradients(work, ctx.needs_input_grad)
        scores, gradient_scores = work.buffer(), work.buffer()
        floats = work.buffer() if kept else None
        grad_BHTE = (grad_BTHE / (1 - ctx.dropout) if kept else grad_BTHE).transpose(1, 2)
        for index, (head, block) in enumerate(work):
            part, queries = work.weights(scores, head, block)
            upstream_nte = grad_BHTE[block.texts, head, block.queries]
            slopes = gradients.of_weights(gradient_scores, head, block, upstream_nte)
            if floats is not None:
                kept_ntx = _as_floats(kept[index], floats)
                slopes.whole_ntx.mul_(kept_ntx)
            # In place: the gradient of the weights becomes that of the scores.
            torch._softmax_backward_data(
                slopes.whole_ntx, part.whole_ntx, -1, part.whole_ntx.dtype, grad_input=slopes.whole_ntx
            )
            if floats is not None:
                part.whole_ntx.mul_(kept_ntx)
            gradients.add_values(part, head, block, upstream_nte)
            gradients.add_scores(slopes, queries, head, block)
        return gradients.result()


class _Gradients:
    """Gradients of one call's operands, summed block by block."""

    def __init__(self, work: _Work, needed: tuple[bool, ...]) -> None:
        self.work = work
        self.needed = dict(zip(_NAMES, needed, strict=False))
        operands = work.operands
        self.q = work.empty(work.num_queries)
        self.is_rotary = operands.persistent_q_BHTE is not operands.q_BHTE
        self.persistent_q = work.empty(work.num_queries) if self.is_rotary else None
        # A block that has all queries has the whole context too, and writes; several blocks of a text add.
        self.adds_context = work.blocking.step < work.num_queries
        length = work.blocking.context
        self.k, self.v = work.empty(length), work.empty(length)
        if self.adds_context:
            self.k.zero_(), self.v.zero_()
        self.r = None if operands.r_HWE is None else torch.zeros_like(operands.r_HWE)
        bias = operands.content_bias_HE
        self.content_bias = None if bias is None else torch.zeros_like(bias)
        self.position_bias = None if bias is None else torch.zeros_like(bias)
        self.persistent_k = torch.empty_like(operands.persistent_k_HNE)
        self.persistent_v = torch.empty_like(operands.persistent_v_HNE)
        self.root = work.blocking.others**0.5

    def of_weights(self, buffer: Tensor, head: int, block: Block, upstream_nte: Tensor) -> _Part:
        """Return the gradient of the weights, in `buffer`."""
        operands, slopes = self.work.operands, self.work.part(buffer, block)
        slopes.context_ntc[..., : block.num_missing] = 0
        values = operands.v_BHSE[block.texts, head, block.context]
        torch.bmm(upstream_nte, values.transpose(1, 2), out=slopes.seen_nts)
        persistent_EN = (operands.persistent_v_HNE[head] * self.root).T
        torch.mm(upstream_nte.flatten(0, 1), persistent_EN, out=slopes.persistent_RN)
        return slopes

    def add_values(self, part: _Part, head: int, block: Block, upstream_nte: Tensor) -> None:
        """Add the gradients of the values, given the weights after dropout."""
        self._add_context(self.v, part.seen_nts, upstream_nte, head, block)
        if self.needed["persistent_v"]:
            rows_RE = upstream_nte.flatten(0, 1)
            self._add_persistent(self.persistent_v, part.persistent_RN, rows_RE, head, block, self.root)

    def add_scores(self, slopes: _Part, queries: _Queries, head: int, block: Block) -> None:
        """Add the gradients of queries, keys, positions and biases, given those of the scores."""
        operands, scale = self.work.operands, self.work.operands.scale
        self._add_context(self.k, slopes.seen_nts, queries.content_nte, head, block)
        if self.needed["persistent_k"]:
            rows_RE = queries.persistent_RE
            self._add_persistent(self.persistent_k, slopes.persistent_RN, rows_RE, head, block, 1.0)
        q_nte = torch.bmm(slopes.seen_nts, operands.k_BHSE[block.texts, head, block.context])
        if self.content_bias is not None:
            self.content_bias[head].add_(q_nte.sum((0, 1)), alpha=scale)
        if operands.r_HWE is not None and queries.position_RE is not None:
            window_RW = slopes.window_ntw.flatten(0, 1)
            position_nte = torch.mm(window_RW, operands.r_HWE[head]).view(q_nte.shape)
            if self.r is not None:
                self.r[head].addmm_(window_RW.T, queries.position_RE)
            if self.position_bias is not None:
                self.position_bias[head].add_(position_nte.sum((0, 1)), alpha=scale)
            q_nte += position_nte
        q_nte *= scale
        persistent_nte = torch.mm(slopes.persistent_RN, operands.persistent_k_HNE[head]).view(q_nte.shape)
        if self.persistent_q is None:
            q_nte += persistent_nte
        else:
            self.persistent_q[block.texts, head, block.queries] = persistent_nte
        self.q[block.texts, head, block.queries] = q_nte

    def _add_context(self, total: Tensor, scores_nts: Tensor, rows_nte: Tensor, head: int, block: Block) -> None:
        target = total[block.texts, head, block.context]
        if self.adds_context:
            target.baddbmm_(scores_nts.transpose(1, 2), rows_nte)
        else:
            torch.bmm(scores_nts.transpose(1, 2), rows_nte, out=target)

    @staticmethod
    def _add_persistent(
        total: Tensor, scores_RN: Tensor, rows_RE: Tensor, head: int, block: Block, factor: float
    ) -> None:
        is_first = block.texts.start == block.queries.start == 0
        total[head].addmm_(scores_RN.T, rows_RE, beta=0.0 if is_first else 1.0, alpha=factor)

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order of the arguments."""
        return tuple(getattr(self, name) if self.needed[name] else None for name in _NAMES) + (None, None, None)


def _operands(tensors: Sequence[Any], padding_BS: Tensor | None, window: int) -> Operands:
    q, persistent_q, k, v, r, content_bias, position_bias, persistent_k, persistent_v = tensors
    return Operands(
        q_BHTE=q,
        persistent_q_BHTE=q if persistent_q is None else persistent_q,
        k_BHSE=k,
        v_BHSE=v,
        r_HWE=r,
        content_bias_HE=content_bias,
        position_bias_HE=position_bias,
        persistent_k_HNE=persistent_k,
        persistent_v_HNE=persistent_v,
        window=window,
        padding_BS=padding_BS,
    )


def _kept(weights_ntx: Tensor, dropout: float) -> Tensor:
    """Draw which weights stay: 1 or 0, uint8, same shape; each is dropped with exactly the asked-for probability.

    One random byte a weight, compared with a threshold. Where the probability is not a multiple of 1/256, each row
    takes the threshold above or below it, by a draw that makes the mean exact.
    """
    rows, columns = weights_ntx.shape[0] * weights_ntx.shape[1], weights_ntx.shape[2]
    words = torch.empty((rows * columns + 7) // 8, dtype=torch.int64, device=weights_ntx.device)
    random_bytes = words.random_(-(2**63), None).view(torch.uint8)[: rows * columns].view(rows, columns)
    level = math.floor(dropout * _LEVELS)
    is_above = torch.rand((rows, 1), device=words.device) < dropout * _LEVELS - level
    # 256 does not fit into a byte, but then the comparison need not be fast.
    threshold = (level + is_above).to(torch.uint8 if level + 1 < _LEVELS else torch.int16)
    return torch.ge(random_bytes, threshold, out=random_bytes).view(weights_ntx.shape)


def _as_floats(kept_ntx: Tensor, buffer: Tensor) -> Tensor:
    """Write zeros and ones as floats: converting and multiplying are each fast, a mixed product is not."""
    return buffer[: kept_ntx.numel()].view(kept_ntx.shape).copy_(kept_ntx)
