"""One layer of the All-attention Transformer: its heads, norm and residual.

Dimensions: B batch, T queries, P past, S context = P + T, W window, H heads left, D width, E head width, N persistent
vectors left in each head, J blocks of them that have a gate each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Operands, eager_attention, sdpa_attention
from .blocked import blocked_attention
from .configuration import AllAttentionConfig
from .dropout import Dropout
from .merged import MOST_QUERIES, few_attention, merged_attention
from .positions import rotate
from .projection import is_plain, project

# PyTorch's fused CPU kernel multiplies these at the speed of float32; its plain products take half the time.
_HALF = (torch.bfloat16, torch.float16)


class OutputBias(nn.Module):
    """What is left of the output projection of a layer without heads: its bias b_O (D,)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the bias at every position, (B, T, D)."""
        return self.bias.expand_as(hidden_BTD)


class AllAttention(nn.Module):
    """One layer's heads. `heads` are those that are left, as indices of the dense model.

    `num_persistent` is how many persistent vectors each of them still has. Deadhead may add two gates: "head_gate" acts
    on what the output projection gets, "block_gate" within the softmax.
    """

    def __init__(self, config: AllAttentionConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.heads = config.layer_heads(layer)
        # Numbers of their own: reading them off a configuration takes as long as a small product.
        self.head_dim = config.head_dim
        self.is_rotary = config.position == "rotary"
        self.num_persistent = config.layer_persistent(layer) if self.heads else 0
        self.persistent_scale = config.num_persistent**0.5
        width, num_heads = config.hidden_size, len(self.heads)
        if not num_heads:
            self.o_proj: nn.Module = OutputBias(width)
            return
        inner, bias = num_heads * config.head_dim, config.projection_bias
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, inner, bias=bias)
        self.v_proj = nn.Linear(width, inner, bias=bias)
        self.o_proj = nn.Linear(inner, width)
        if self.num_persistent:
            self.persistent_k = nn.Parameter(torch.empty(num_heads, self.num_persistent, config.head_dim))
            self.persistent_v = nn.Parameter(torch.empty(num_heads, self.num_persistent, config.head_dim))
        if config.position != "rotary":
            self.r_proj = nn.Linear(width, inner, bias=bias)
            if not config.share_position_bias:
                self.content_bias = nn.Parameter(torch.zeros(num_heads, config.head_dim))
                self.position_bias = nn.Parameter(torch.zeros(num_heads, config.head_dim))

    def _active_heads(self) -> Tensor | None:
        """Return the positions of the heads to compute, or None for all.

        Those that a gate of deadhead's multiplies by 0, without a gradient, change neither the output nor any gradient.
        """
        idle = () if torch.compiler.is_compiling() else getattr(getattr(self, "head_gate", None), "idle", ())
        if not idle:
            return None
        # One head at least, so that every parameter takes part: distributed training waits for all their gradients.
        active = [head for head in range(len(self.heads)) if head not in idle] or [0]
        return torch.tensor(active, device=next(self.parameters()).device)

    def _project(self, projection: nn.Module, hidden: Tensor, active_H: Tensor | None) -> Tensor:
        """Return the projection of the heads to compute, (B, heads, length, E)."""
        heads, width = len(self.heads), self.head_dim
        if active_H is None or not is_plain(projection):
            return _select(project(projection, hidden).unflatten(-1, (heads, width)).transpose(1, 2), active_H, dim=1)
        weight = _select(projection.weight.unflatten(0, (heads, width)), active_H).flatten(0, 1)
        bias: Tensor | None = projection.bias
        bias = None if bias is None else _select(bias.unflatten(0, (heads, width)), active_H).flatten()
        return nn.functional.linear(hidden, weight, bias).unflatten(-1, (-1, width)).transpose(1, 2)

    def forward(
        self,
        normed_BTD: Tensor,  # of the queries
        context_BSD: Tensor,  # normed states whose keys and values are needed: memory and queries
        blank_D: Tensor | None,  # the normed zero state, which stands before the first token, if it is attended
        positions_WD: Tensor | None,  # p, oldest distance first; None for rotary positions
        shared_bias: tuple[Tensor, Tensor] | None,  # u and v (H of the dense model, E), if the layers share them
        padding_BS: Tensor | None,  # True where a column of the context is padding; None if none is
        past_key_values: Cache | None,  # which this layer's keys and values join
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project; return the attention weights too if they are needed."""
        batch, num_queries, _ = normed_BTD.shape
        if not self.heads:
            if past_key_values is not None:
                # Lengths are read off the layers' caches, so an empty layer must count its positions too.
                placeholder = normed_BTD.new_zeros((batch, 1, num_queries, 1))
                past_key_values.update(placeholder, placeholder, self.layer)
            return self.o_proj(normed_BTD), None
        active_H = self._active_heads() if past_key_values is None and not need_weights else None
        # Read here, since a text may be read with a longer memory than the model was trained with.
        memory_length = self.config.memory_length
        q_BHTE = self._project(self.q_proj, normed_BTD, active_H)
        k_BHSE, v_BHSE = (self._project(part, context_BSD, active_H) for part in (self.k_proj, self.v_proj))
        # Persistent vectors have no position: they meet the queries as they are before any rotation.
        persistent_q_BHTE = q_BHTE
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.layer))
        is_first = start == 0
        if self.is_rotary:
            offset = start + context_BSD.shape[1] - num_queries
            q_BHTE, k_BHSE = rotate(q_BHTE, offset), rotate(k_BHSE, start)
        if past_key_values is not None:
            k_BHSE, v_BHSE = past_key_values.update(k_BHSE, v_BHSE, self.layer)
            # A static cache hands out places that are not filled yet, one that does not slide all that ever was.
            filled = min(start + num_queries, k_BHSE.shape[2])
            first = max(0, filled - (memory_length + num_queries))
            k_BHSE, v_BHSE = k_BHSE[:, :, first:filled], v_BHSE[:, :, first:filled]
            start -= k_BHSE.shape[2] - num_queries
        if blank_D is not None:
            missing = memory_length + num_queries - k_BHSE.shape[2]
            k_BHSE, v_BHSE = self._with_blanks(k_BHSE, v_BHSE, blank_D, padding_BS, missing, start, active_H)

        content_bias_HE = position_bias_HE = r_HWE = None
        if positions_WD is not None:
            content_bias_HE, position_bias_HE = (_select(bias, active_H) for bias in self._biases(shared_bias))
            r_HWE = self._position_keys(positions_WD, active_H, past_key_values, is_first)
        persistent_k_HNE, persistent_v_HNE, z_N = self._persistent(q_BHTE, active_H)
        operands = Operands(
            q_BHTE=q_BHTE,
            persistent_q_BHTE=persistent_q_BHTE,
            k_BHSE=k_BHSE,
            v_BHSE=v_BHSE,
            r_HWE=r_HWE,
            content_bias_HE=content_bias_HE,
            position_bias_HE=position_bias_HE,
            persistent_k_HNE=persistent_k_HNE,
            persistent_v_HNE=persistent_v_HNE,
            persistent_scale=self.persistent_scale,
            window=memory_length + 1,
            padding_BS=padding_BS[:, -k_BHSE.shape[2] :] if padding_BS is not None and blank_D is None else None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            z_N=z_N,
        )
        attended_BTHE, weights = self._attend(operands, need_weights)
        if active_H is not None:
            # The gates multiply what stands in the other heads' places by 0.
            everything = attended_BTHE.new_zeros((batch, num_queries, len(self.heads), self.head_dim))
            attended_BTHE = everything.index_copy(2, active_H, attended_BTHE)
        return project(self.o_proj, attended_BTHE.flatten(-2)), weights

    def _persistent(self, q_BHTE: Tensor, active_H: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return m^k and m^v of the heads to compute, each (heads, N, E), and the vectors' gates if they are to act."""
        if not self.num_persistent:
            none_HNE = q_BHTE.new_empty((q_BHTE.shape[1], 0, self.head_dim))
            return none_HNE, none_HNE, None
        k_HNE, v_HNE = _select(self.persistent_k, active_H), _select(self.persistent_v, active_H)
        gate: Any = self._modules.get("block_gate")
        if gate is None:
            return k_HNE, v_HNE, None
        z_J, _ = gate()
        # Which gate each vector has.
        owner_N = gate.owner
        if not torch.compiler.is_compiling():
            shut = gate.idle if gate.training else (z_J == 0).nonzero().flatten().tolist()
            if shut:
                # Shut, and in no need of a gradient.
                rows_N = (~torch.isin(owner_N, torch.tensor(shut, device=owner_N.device))).nonzero().flatten()
                k_HNE, v_HNE = k_HNE.index_select(1, rows_N), v_HNE.index_select(1, rows_N)
                owner_N = owner_N.index_select(0, rows_N)
            if not gate.training:
                return k_HNE, v_HNE, None
        return k_HNE, v_HNE, z_J.index_select(-1, owner_N)

    def _position_keys(
        self, positions_WD: Tensor, active_H: Tensor | None, past_key_values: Cache | None, is_first: bool
    ) -> Tensor:
        """Return W_R p, (H, W, E). As long as a cache lives it is computed once, as keys and values are."""
        known: dict[int, Tensor] = {}
        if past_key_values is not None and not torch.is_grad_enabled():
            known = past_key_values.__dict__.setdefault("position_keys", known)
        if is_first or self.layer not in known:
            known[self.layer] = self._project(self.r_proj, positions_WD[None], active_H)[0]
        return known[self.layer]

    def _attend(self, operands: Operands, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Attend by the fastest code for the device, the mode and the precision."""
        is_plain_cpu = operands.q_BHTE.device.type == "cpu" and not torch.compiler.is_compiling()
        # Fused attention gives no gradient to the gate of a vector that it does not see.
        has_other_gates = operands.z_N is not None and not (is_plain_cpu and operands.z_N.ndim == 1)
        if need_weights or has_other_gates or self.config._attn_implementation == "eager":
            return eager_attention(operands, need_weights=need_weights)
        if not is_plain_cpu:
            return sdpa_attention(operands), None
        # Reentrant checkpointing trains without gradients first, and must meet the same dropout when it recomputes.
        if torch.is_grad_enabled() or self.training:
            return blocked_attention(operands), None
        batch, _, num_queries, _ = operands.q_BHTE.shape
        if batch * num_queries <= MOST_QUERIES:
            return few_attention(operands), None
        return blocked_attention(operands) if operands.q_BHTE.dtype in _HALF else merged_attention(operands), None

    def _biases(self, shared: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if shared is None:
            return self.content_bias, self.position_bias
        return shared[0][list(self.heads)], shared[1][list(self.heads)]

    def _with_blanks(
        self,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        blank_D: Tensor,
        padding_BS: Tensor | None,
        missing: int,
        start: int,
        active_H: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Let every column before a row's first token hold the keys and values of a zero hidden state."""
        if not missing and padding_BS is None:
            return k_BHSE, v_BHSE
        blank_k, blank_v = (
            self._project(part, blank_D[None, None], active_H).expand(-1, -1, missing + k_BHSE.shape[2], -1)
            for part in (self.k_proj, self.v_proj)
        )
        if self.is_rotary:
            blank_k = rotate(blank_k, start - missing)
        shape = (k_BHSE.shape[0], -1, -1, -1)
        k = torch.cat([blank_k[:, :, :missing].expand(shape), k_BHSE], dim=2)
        v = torch.cat([blank_v[:, :, :missing].expand(shape), v_BHSE], dim=2)
        if padding_BS is not None:
            is_blank = nn.functional.pad(padding_BS[:, -k_BHSE.shape[2] :], (missing, 0))[:, None, :, None]
            k, v = torch.where(is_blank, blank_k, k), torch.where(is_blank, blank_v, v)
        return k, v


def _select(tensor: Tensor, active_H: Tensor | None, dim: int = 0) -> Tensor:
    """Return the rows of the heads to compute."""
    return tensor if active_H is None else tensor.index_select(dim, active_H)


class FeedForward(nn.Module):
    """A feed-forward layer with its norm and residual: h + Dropout(W₂ · Dropout(ReLU(W₁ LN(h) + b₁)) + b₂).

    Without hidden units W₂'s bias is left.
    """

    def __init__(self, config: AllAttentionConfig, layer: int) -> None:
        super().__init__()
        self.width = config.layer_feed_forward(layer)
        self.dense_feed_forward = config.feed_forward_size
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        if self.width:
            self.up_proj = nn.Linear(config.hidden_size, self.width)
            self.down_proj: nn.Module = nn.Linear(self.width, config.hidden_size)
        else:
            self.down_proj = OutputBias(config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D)."""
        if not self.width:
            return hidden_BTD + self.dropout(self.down_proj(hidden_BTD))
        inner_BTF = self.dropout(torch.relu(project(self.up_proj, self.norm(hidden_BTD))))
        return hidden_BTD + self.dropout(project(self.down_proj, inner_BTF))


class AllAttentionLayer(GradientCheckpointingLayer):
    """Pre-norm, attention, dropout, residual; then a feed-forward layer if the configuration has any."""

    def __init__(self, config: AllAttentionConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AllAttention(config, layer)
        self.dropout = Dropout(config.hidden_dropout)
        self.feed_forward = FeedForward(config, layer) if config.feed_forward_size else nn.Identity()

    def forward(
        self,
        hidden_BTD: Tensor,
        memory_BPD: Tensor | None,
        positions_WD: Tensor | None,
        shared_bias: tuple[Tensor, Tensor] | None,
        padding_BS: Tensor | None = None,
        past_key_values: Cache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output (B, T, D) and its attention weights if they were asked for."""
        context = self.norm(hidden_BTD if memory_BPD is None else torch.cat([memory_BPD, hidden_BTD], dim=1))
        attended, weights = self.attention(
            context[:, -hidden_BTD.shape[1] :],
            context,
            self.norm(torch.zeros_like(hidden_BTD[0, 0])) if self.attention.config.attend_initial_memory else None,
            positions_WD,
            shared_bias,
            padding_BS,
            past_key_values,
            need_weights,
        )
        return self.feed_forward(hidden_BTD + self.dropout(attended)), weights
