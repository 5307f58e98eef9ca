"""The same attention a block at a time, with a backward pass of its own: exact, and near the speed of its products.

A plain softmax over B × H × T × (S + N) scores spends more time on memory, dropout and copies than on products. Here
scores live in one small buffer: a block is scored, exponentiated, dropped out and multiplied by the values while it is
in the cache, and scored again in the backward pass. Only dropout's choices are kept, a byte for each weight.

Vectors whose gates are shut are not in the forward pass at all. For the gates' gradients, with p = e^score / Σ e^score,
the sum over what is in the softmax, g the gradient of the output o, and v the value of a persistent vector:

    ∂/∂z = Σ_rows p (g·v − g·o),

which for an open gate is what its vector's scores have for a gradient, and for a shut one needs p and g·v of its own.

Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads, E head width,
N persistent vectors in the softmax, C shut out, G = N + C gates; of a block h heads, n texts, t queries, s positions of
c = W + t − 1 columns; P = h · n pairs of head and text, R = n · t rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Operands, largest_exponent, padding_bias
from .blocks import Block, Blocking, by_distance
from .dropout import draw_kept

# Scores in a block: a few MB. Smaller blocks lose more to the many calls, larger ones more to memory (measured).
_CAPACITY = 2**21
# Those of a call that may need gradients.
_NAMES = ("q", "persistent_q", "k", "v", "r", "content_bias", "position_bias", "persistent_k", "persistent_v", "z")
# Tensors that never get gradients, and numbers.
_NUM_CONSTANT, _NUM_NUMBERS = 3, 3


def blocked_attention(operands: Operands) -> Tensor:
    """Attend; differentiable once, in every tensor. Returns (B, T, H, E)."""

    # Inside, everything has the queries' precision: what autocast would do with each product, done once.
    def like_q(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(operands.q_BHTE.dtype)

    # Heads come first, so that a head's texts lie together and one product serves several heads.
    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).to(operands.q_BHTE.dtype).contiguous()

    has_own = operands.persistent_q_BHTE is not operands.q_BHTE
    k_HNE, v_HNE, z_N = operands.persistent_k_HNE, operands.persistent_v_HNE, operands.z_N
    shut_k_HCE = shut_v_HCE = None
    if z_N is not None and not bool(z_N.all()):
        is_open_N = z_N != 0
        opened, shut = is_open_N.nonzero()[:, 0], (~is_open_N).nonzero()[:, 0]
        shut_k_HCE, shut_v_HCE = k_HNE.detach().index_select(1, shut), v_HNE.detach().index_select(1, shut)
        k_HNE, v_HNE = k_HNE.index_select(1, opened), v_HNE.index_select(1, opened)
        z_N = z_N.index_select(0, torch.cat([opened, shut]))
    with torch.autocast(operands.q_BHTE.device.type, enabled=False):
        attended: Tensor = _BlockedAttention.apply(
            heads_first(operands.q_BHTE),
            heads_first(operands.persistent_q_BHTE) if has_own else None,
            heads_first(operands.k_BHSE),
            heads_first(operands.v_BHSE),
            like_q(operands.r_HWE),
            like_q(operands.content_bias_HE),
            like_q(operands.position_bias_HE),
            like_q(k_HNE),
            like_q(v_HNE),
            z_N,
            like_q(shut_k_HCE),
            like_q(shut_v_HCE),
            operands.padding_BS,
            operands.persistent_scale,
            operands.window,
            operands.dropout,
        )
    return attended


@dataclass(frozen=True)
class _Call:
    """One call's tensors, in the order of the arguments."""

    q_HBTE: Tensor
    persistent_q_HBTE: Tensor | None
    k_HBSE: Tensor
    v_HBSE: Tensor
    r_HWE: Tensor | None
    content_bias_HE: Tensor | None
    position_bias_HE: Tensor | None
    persistent_k_HNE: Tensor
    persistent_v_HNE: Tensor
    z_G: Tensor | None  # for its gradient only; open ones first
    shut_k_HCE: Tensor | None
    shut_v_HCE: Tensor | None
    padding_BS: Tensor | None
    root: float  # √N of the dense model
    window: int

    @property
    def scale(self) -> float:
        return float(self.q_HBTE.shape[-1] ** -0.5)

    @property
    def num_shut(self) -> int:
        return 0 if self.shut_k_HCE is None else self.shut_k_HCE.shape[1]

    @property
    def blocking(self) -> Blocking:
        heads, batch, queries, _ = self.q_HBTE.shape
        return Blocking(
            heads=heads,
            batch=batch,
            queries=queries,
            context=self.k_HBSE.shape[2],
            window=self.window,
            others=self.persistent_k_HNE.shape[1] + self.num_shut,
            capacity=_CAPACITY,
        )

    def buffer(self) -> Tensor:
        return self.q_HBTE.new_empty(self.blocking.size)

    def part(self, buffer: Tensor, block: Block) -> _Part:
        """View the buffer as scores of a block."""
        heads, texts, queries = block.shape
        row = block.columns + self.persistent_k_HNE.shape[1]
        whole = buffer[: heads * texts * queries * row].view(heads * texts, queries, row)
        context = whole[..., : block.columns]
        return _Part(
            whole_Ptx=whole,
            context_Ptc=context,
            seen_Pts=context[..., block.num_missing :],
            window_PtW=by_distance(context, self.window),
            persistent_hRN=whole.view(heads, texts * queries, row)[..., block.columns :],
            shut_hRC=buffer[whole.numel() :][: heads * texts * queries * self.num_shut].view(
                heads, texts * queries, self.num_shut
            ),
        )

    def queries(self, block: Block) -> _Queries:
        q_hntE = self.q_HBTE[block.heads, block.texts, block.queries]
        content_hntE, position_hRE = q_hntE, None
        if self.content_bias_HE is not None and self.position_bias_HE is not None:
            content_hntE = q_hntE + self.content_bias_HE[block.heads, None, None]
            position_hRE = (q_hntE + self.position_bias_HE[block.heads, None, None]).mul_(self.scale).flatten(1, 2)
        own_hntE = q_hntE
        if self.persistent_q_HBTE is not None:
            own_hntE = self.persistent_q_HBTE[block.heads, block.texts, block.queries]
        return _Queries((content_hntE * self.scale).flatten(0, 1), position_hRE, own_hntE.flatten(1, 2))

    def context(self, tensor_HBSE: Tensor, block: Block) -> Tensor:
        """Return a block's part of keys or values, (P, s, E), as a view."""
        heads, texts, _ = block.shape
        part = tensor_HBSE[block.heads, block.texts, block.context]
        return part.view(heads * texts, *part.shape[2:])

    def weights(self, buffer: Tensor, block: Block, *, with_shut: bool = False) -> tuple[_Part, _Queries]:
        """Return the attention weights of a block, before dropout, in `buffer`, and p of what is shut out if asked."""
        part, queries = self.part(buffer, block), self.queries(block)
        part.context_Ptc.fill_(-math.inf)
        if queries.position_hRE is None or self.r_HWE is None:
            part.window_PtW.zero_()
        else:
            position_hRW = torch.bmm(queries.position_hRE, self.r_HWE[block.heads].transpose(1, 2))
            part.window_PtW.copy_(position_hRW.view(part.window_PtW.shape))
        part.context_Ptc[..., : block.num_missing] = -math.inf
        # Into a tensor of its own: many small products straight into rows of the buffer run one after the other.
        part.seen_Pts.add_(torch.bmm(queries.content_PtE, self.context(self.k_HBSE, block).transpose(1, 2)))
        if self.padding_BS is not None:
            padding_nts = padding_bias(self.padding_BS[block.texts, None, block.context], buffer.dtype)
            part.seen_Pts.unflatten(0, block.shape[:2]).add_(padding_nts)
        persistent_hEN = self.persistent_k_HNE[block.heads].transpose(1, 2)
        _multiply(queries.persistent_hRE, persistent_hEN, out=part.persistent_hRN)
        precise = torch.promote_types(buffer.dtype, torch.float32)
        top_Pt1 = part.whole_Ptx.amax(-1, keepdim=True).to(precise) if with_shut else None
        torch.softmax(part.whole_Ptx, -1, out=part.whole_Ptx)
        if top_Pt1 is None or self.shut_k_HCE is None:
            return part, queries
        # The largest weight is e^(top − log Σ).
        log_sum_Pt1 = top_Pt1 - part.whole_Ptx.amax(-1, keepdim=True).to(precise).log()
        shut_hEC = self.shut_k_HCE[block.heads].transpose(1, 2)
        _multiply(queries.persistent_hRE, shut_hEC, out=part.shut_hRC)
        part.shut_hRC.sub_(log_sum_Pt1.view(*part.shut_hRC.shape[:2], 1))
        part.shut_hRC.clamp_(max=largest_exponent(buffer.dtype)).exp_()
        return part, queries


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Scores or weights of a block, as views of one buffer."""

    whole_Ptx: Tensor  # all columns: context, then persistent
    context_Ptc: Tensor
    seen_Pts: Tensor  # the columns of the context that exist
    window_PtW: Tensor  # the context by distance
    persistent_hRN: Tensor
    shut_hRC: Tensor  # behind the others in the buffer


@dataclass(frozen=True)
class _Queries:
    """The three kinds of queries of a block."""

    content_PtE: Tensor  # (q + u) / √E
    position_hRE: Tensor | None  # (q + v) / √E
    persistent_hRE: Tensor  # q


class _BlockedAttention(torch.autograd.Function):
    """Forward and backward over all blocks. Gradients are those of a plain softmax with the same dropout."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, dropout = arguments
        call = _Call(*tensors)
        heads, batch, num_queries, width = call.q_HBTE.shape
        attended_BTHE = call.q_HBTE.new_empty((batch, num_queries, heads, width))
        scores, floats = call.buffer(), call.buffer() if dropout else None
        kept: list[Tensor] = []
        for block in call.blocking:
            part, _ = call.weights(scores, block)
            if floats is not None:
                kept.append(draw_kept(part.whole_Ptx.shape, dropout))
                part.whole_Ptx.mul_(_as_floats(kept[-1], floats))
            sum_hRE = _multiply(part.persistent_hRN, call.persistent_v_HNE[block.heads]).mul_(call.root)
            sum_PtE = sum_hRE.view(len(part.seen_Pts), -1, width)
            sum_PtE.baddbmm_(part.seen_Pts, call.context(call.v_HBSE, block))
            target_hntE = attended_BTHE[block.texts, block.queries, block.heads].permute(2, 0, 1, 3)
            target_hntE.copy_(sum_PtE.view(target_hntE.shape))
        if dropout:
            attended_BTHE.div_(1 - dropout)
        ctx.save_for_backward(*tensors[:-2], None if call.shut_k_HCE is None else attended_BTHE, *kept)
        ctx.root, ctx.window, ctx.dropout = call.root, call.window, dropout
        return attended_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: checkpointed activations are computed anew for it.
        saved, num_tensors = ctx.saved_tensors, len(_NAMES) + _NUM_CONSTANT
        call = _Call(*(*saved[:num_tensors], ctx.root, ctx.window))
        output_BTHE, *kept = saved[num_tensors:]
        gradients = _Gradients(call, ctx.needs_input_grad)
        scores, slope_scores = call.buffer(), call.buffer()
        floats = call.buffer() if kept else None
        whole_HBTE = grad_BTHE.permute(2, 0, 1, 3)
        grad_HBTE = (whole_HBTE / (1 - ctx.dropout) if kept else whole_HBTE).contiguous()
        along_HBT = None if output_BTHE is None else (grad_BTHE * output_BTHE).sum(-1).permute(2, 0, 1)
        for index, block in enumerate(call.blocking):
            part, queries = call.weights(scores, block, with_shut=along_HBT is not None)
            rows = (block.heads, block.texts, block.queries)
            upstream_hntE = grad_HBTE[rows]
            slopes = gradients.of_weights(slope_scores, block, upstream_hntE)
            if along_HBT is not None:
                gradients.add_shut(part, slopes, whole_HBTE[rows], along_HBT[rows], block)
            if floats is not None:
                kept_Ptx = _as_floats(kept[index], floats)
                slopes.whole_Ptx.mul_(kept_Ptx)
            # In place: the gradient of the weights becomes that of the scores.
            torch._softmax_backward_data(
                slopes.whole_Ptx, part.whole_Ptx, -1, part.whole_Ptx.dtype, grad_input=slopes.whole_Ptx
            )
            if floats is not None:
                part.whole_Ptx.mul_(kept_Ptx)
            gradients.add_values(part, block, upstream_hntE)
            gradients.add_scores(slopes, queries, block)
        return gradients.result()


class _Gradients:
    """Gradients of one call's tensors, summed block by block."""

    def __init__(self, call: _Call, needed: tuple[bool, ...]) -> None:
        self.call = call
        self.needed = dict(zip(_NAMES, needed, strict=False))
        self.q = torch.empty_like(call.q_HBTE)
        self.persistent_q = None if call.persistent_q_HBTE is None else torch.empty_like(self.q)
        # A block that has all queries has the whole context too, and writes; several blocks of a text add.
        self.adds_context = call.blocking.num_queries < call.blocking.queries
        new = torch.zeros_like if self.adds_context else torch.empty_like
        self.k, self.v = new(call.k_HBSE), new(call.v_HBSE)
        small = (call.r_HWE, call.content_bias_HE, call.position_bias_HE, call.z_G)
        self.r, self.content_bias, self.position_bias, self.z = (
            None if tensor is None else torch.zeros_like(tensor) for tensor in small
        )
        self.persistent_k = torch.empty_like(call.persistent_k_HNE)
        self.persistent_v = torch.empty_like(call.persistent_v_HNE)

    def of_weights(self, buffer: Tensor, block: Block, upstream_hntE: Tensor) -> _Part:
        call, slopes = self.call, self.call.part(buffer, block)
        slopes.context_Ptc[..., : block.num_missing] = 0
        values_PEs = call.context(call.v_HBSE, block).transpose(1, 2)
        slopes.seen_Pts.copy_(torch.bmm(upstream_hntE.flatten(0, 1), values_PEs))
        persistent_hEN = call.persistent_v_HNE[block.heads].transpose(1, 2)
        _multiply((upstream_hntE * call.root).flatten(1, 2), persistent_hEN, out=slopes.persistent_hRN)
        return slopes

    def add_values(self, part: _Part, block: Block, upstream_hntE: Tensor) -> None:
        """Add the gradients of the values, given the weights after dropout."""
        self._add_context(self.v, part.seen_Pts, upstream_hntE.flatten(0, 1), block)
        if self.needed["persistent_v"]:
            rows_hRE = upstream_hntE.flatten(1, 2)
            self._add_persistent(self.persistent_v, part.persistent_hRN, rows_hRE, block, self.call.root)

    def add_scores(self, slopes: _Part, queries: _Queries, block: Block) -> None:
        """Add the gradients of queries, keys, positions and biases, given those of the scores."""
        call, heads = self.call, block.heads
        self._add_context(self.k, slopes.seen_Pts, queries.content_PtE, block)
        if self.needed["persistent_k"]:
            self._add_persistent(self.persistent_k, slopes.persistent_hRN, queries.persistent_hRE, block, 1.0)
        if self.z is not None:
            self.z[: call.persistent_k_HNE.shape[1]] += slopes.persistent_hRN.sum((0, 1), dtype=self.z.dtype)
        q_PtE = torch.bmm(slopes.seen_Pts, call.context(call.k_HBSE, block))
        q_hRE = q_PtE.view(block.shape[0], -1, q_PtE.shape[-1])
        if self.content_bias is not None:
            self.content_bias[heads].add_(q_hRE.sum(1), alpha=call.scale)
        if self.r is not None and call.r_HWE is not None and queries.position_hRE is not None:
            window_hRW = slopes.window_PtW.reshape(block.shape[0], -1, call.window)
            position_hRE = torch.bmm(window_hRW, call.r_HWE[heads])
            self.r[heads].baddbmm_(window_hRW.transpose(1, 2), queries.position_hRE)
            if self.position_bias is not None:
                self.position_bias[heads].add_(position_hRE.sum(1), alpha=call.scale)
            q_hRE += position_hRE
        q_hRE *= call.scale
        persistent_hRE = _multiply(slopes.persistent_hRN, call.persistent_k_HNE[heads])
        target_hntE = self.q[heads, block.texts, block.queries]
        if self.persistent_q is None:
            q_hRE += persistent_hRE
        else:
            self.persistent_q[heads, block.texts, block.queries] = persistent_hRE.view(target_hntE.shape)
        target_hntE.copy_(q_hRE.view(target_hntE.shape))

    def add_shut(self, part: _Part, slopes: _Part, upstream_hntE: Tensor, along_hnt: Tensor, block: Block) -> None:
        """Add the gradients of shut gates, given p of their vectors in `part`, g without dropout and g·o."""
        call = self.call
        assert self.z is not None and call.shut_v_HCE is not None
        shut_hEC = call.shut_v_HCE[block.heads].transpose(1, 2)
        _multiply((upstream_hntE * call.root).flatten(1, 2), shut_hEC, out=slopes.shut_hRC)
        slopes.shut_hRC.sub_(along_hnt.flatten(1, 2)[..., None]).mul_(part.shut_hRC)
        self.z[call.persistent_k_HNE.shape[1] :] += slopes.shut_hRC.sum((0, 1), dtype=self.z.dtype)

    def _add_context(self, total: Tensor, scores_Pts: Tensor, rows_PtE: Tensor, block: Block) -> None:
        target_PsE = self.call.context(total, block)
        if self.adds_context:
            target_PsE.baddbmm_(scores_Pts.transpose(1, 2), rows_PtE)
        else:
            torch.bmm(scores_Pts.transpose(1, 2), rows_PtE, out=target_PsE)

    @staticmethod
    def _add_persistent(total: Tensor, scores_hRN: Tensor, rows_hRE: Tensor, block: Block, factor: float) -> None:
        beta, target_hNE, scores_hNR = float(not block.is_first), total[block.heads], scores_hRN.transpose(1, 2)
        if len(target_hNE) == 1:
            target_hNE[0].addmm_(scores_hNR[0], rows_hRE[0], beta=beta, alpha=factor)
        else:
            target_hNE.baddbmm_(scores_hNR, rows_hRE, beta=beta, alpha=factor)

    def result(self) -> tuple[Tensor | None, ...]:
        found = [getattr(self, name) if self.needed[name] else None for name in _NAMES]
        return (*found, *[None] * (_NUM_CONSTANT + _NUM_NUMBERS))


def _multiply(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply each head's matrices; `mm` spreads a single pair over the cores better, and reads rows of a buffer."""
    if len(left) == 1:
        return torch.mm(left[0], right[0], out=None if out is None else out[0])[None]
    return torch.bmm(left, right, out=out)


def _as_floats(kept: Tensor, buffer: Tensor) -> Tensor:
    """Write zeros and ones as floats: converting and multiplying are each fast, a mixed product is not."""
    return buffer[: kept.numel()].view(kept.shape).copy_(kept)
