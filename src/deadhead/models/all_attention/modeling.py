"""The All-attention Transformer (Sukhbaatar et al. 2019) with relative positions and segment memory (Dai et al. 2019).

A layer is  h ← h + Dropout(W_O · concat_h head_h(LN(h), LN(memory)) + b_O);  there is no feed-forward layer, instead
every head owns N persistent key/value vectors that join the context's in one softmax. With r = W_R p:

    content (q + u)·k      position (q + v)·r_{i−j}      persistent q·(√E m^k)      all / √E,      values v and √N m^v

Every query sees exactly memory + 1 positions ("same length" attention), so carrying hidden states from segment to
segment (training) and carrying keys and values in a sliding cache (evaluation) compute the same function.

Layers may differ in their number of heads: `config.head_plan` names those that are left. A layer with none adds b_O.

Imports torch and transformers only, never deadhead: these files travel with checkpoints.
Dimensions: B batch, T queries, P past, S context = P + T, M memory, W window = M + 1, H heads, D width, E head width,
N persistent vectors, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .attention import band, eager_attention, sdpa_attention
from .configuration import AllAttentionConfig
from .positions import rotate, sinusoidal_table

# Bytes; torch allocates every tensor at a multiple of it.
_ALIGNMENT = 64


@dataclass
class AllAttentionOutput(ModelOutput):
    """What the model returns. `memory` holds each layer's last M inputs (L tensors of (B, ≤ M, D)), without a cache."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    memory: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None


@dataclass
class AllAttentionCausalLMOutput(ModelOutput):
    """What the language model returns. With an adaptive softmax `logits` are log-probabilities."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    memory: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None


class OutputBias(nn.Module):
    """What is left of the output projection of a layer without heads: its bias b_O (D,)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the bias at every position, (B, T, D)."""
        return self.bias.expand_as(hidden_BTD)


class AllAttention(nn.Module):
    """One layer's heads. `heads` are those that are left, as indices of the dense model."""

    def __init__(self, config: AllAttentionConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.heads = config.layer_heads(layer)
        width, num_heads = config.hidden_size, len(self.heads)
        if not num_heads:
            self.o_proj: nn.Module = OutputBias(width)
            return
        inner, bias = num_heads * config.head_dim, config.projection_bias
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, inner, bias=bias)
        self.v_proj = nn.Linear(width, inner, bias=bias)
        self.o_proj = nn.Linear(inner, width)
        self.persistent_k = nn.Parameter(torch.empty(num_heads, config.num_persistent, config.head_dim))
        self.persistent_v = nn.Parameter(torch.empty(num_heads, config.num_persistent, config.head_dim))
        if config.position != "rotary":
            self.r_proj = nn.Linear(width, inner, bias=bias)
            if not config.share_position_bias:
                self.content_bias = nn.Parameter(torch.zeros(num_heads, config.head_dim))
                self.position_bias = nn.Parameter(torch.zeros(num_heads, config.head_dim))

    def _split(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (len(self.heads), self.config.head_dim)).transpose(1, 2)

    def forward(
        self,
        normed_BTD: Tensor,
        context_BSD: Tensor,
        blank_D: Tensor,
        positions_WD: Tensor | None,
        shared_bias: tuple[Tensor, Tensor] | None,
        padding_BS: Tensor | None,
        past_key_values: Cache | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project.

        Args:
            normed_BTD: normed hidden states of the queries.
            context_BSD: normed hidden states whose keys and values are needed: memory and queries.
            blank_D: the normed zero state, which stands before the first token if initial memory is attended.
            positions_WD: p, oldest distance first; None for rotary positions.
            shared_bias: u and v (H of the dense model, E), if they are shared by the layers.
            padding_BS: True where a column of the context is padding; None if none is.
            past_key_values: the cache, which this layer's keys and values join.
            need_weights: whether to return the attention weights.
        """
        batch, num_queries, _ = normed_BTD.shape
        if not self.heads:
            if past_key_values is not None:
                # Lengths are read off the layers' caches, so an empty layer must count its positions too.
                placeholder = normed_BTD.new_zeros((batch, 1, num_queries, 1))
                past_key_values.update(placeholder, placeholder, self.layer)
            return self.o_proj(normed_BTD), None
        config = self.config
        q_BHTE, k_BHSE, v_BHSE = (
            self._split(self.q_proj(normed_BTD)),
            self._split(self.k_proj(context_BSD)),
            self._split(self.v_proj(context_BSD)),
        )
        # Persistent vectors have no position: they meet the queries as they are before any rotation.
        persistent_q_BHTE = q_BHTE
        start = 0
        if past_key_values is not None:
            start = past_key_values.get_seq_length(self.layer)
        if config.position == "rotary":
            offset = start + context_BSD.shape[1] - num_queries
            q_BHTE, k_BHSE = rotate(q_BHTE, offset), rotate(k_BHSE, start)
        if past_key_values is not None:
            k_BHSE, v_BHSE = past_key_values.update(k_BHSE, v_BHSE, self.layer)
            start -= k_BHSE.shape[2] - num_queries
        if config.attend_initial_memory:
            k_BHSE, v_BHSE = self._with_blanks(k_BHSE, v_BHSE, blank_D, padding_BS, num_queries, start)

        content_bias_HE = None
        if positions_WD is None:
            window_W = q_BHTE.new_zeros((1, 1, num_queries, config.sliding_window))
            bias_BHTS = band(window_W, k_BHSE.shape[2])
        else:
            content_bias_HE, position_bias_HE = self._biases(shared_bias)
            r_HWE = self.r_proj(positions_WD).unflatten(-1, (len(self.heads), config.head_dim)).transpose(0, 1)
            position_q = (q_BHTE + position_bias_HE[:, None]) * config.head_dim**-0.5
            bias_BHTS = band(torch.matmul(position_q, r_HWE.transpose(-1, -2)), k_BHSE.shape[2])
        if padding_BS is not None and not config.attend_initial_memory:
            bias_BHTS = bias_BHTS.masked_fill(padding_BS[:, None, None, -k_BHSE.shape[2] :], float("-inf"))

        operands = (q_BHTE, persistent_q_BHTE, k_BHSE, v_BHSE, bias_BHTS, self.persistent_k, self.persistent_v)
        dropout = config.attention_dropout if self.training else 0.0
        weights = None
        # On the CPU the fused kernels give no gradient for the position bias, and fall back to slower code. Reentrant
        # checkpointing trains without gradients first, and must meet the same dropout again when it recomputes.
        slow_fused = (torch.is_grad_enabled() or self.training) and q_BHTE.device.type == "cpu"
        if need_weights or slow_fused or config._attn_implementation == "eager":
            attended_BHTE, weights = eager_attention(
                *operands, content_bias_HE=content_bias_HE, dropout=dropout, need_weights=need_weights
            )
        else:
            attended_BHTE = sdpa_attention(*operands, content_bias_HE=content_bias_HE, dropout=dropout)
        return self.o_proj(attended_BHTE.transpose(1, 2).flatten(-2)), weights

    def _biases(self, shared: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if shared is None:
            return self.content_bias, self.position_bias
        heads = list(self.heads)
        return shared[0][heads], shared[1][heads]

    def _with_blanks(
        self,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        blank_D: Tensor,
        padding_BS: Tensor | None,
        num_queries: int,
        start: int,
    ) -> tuple[Tensor, Tensor]:
        """Let every column before a row's first token hold the keys and values of a zero hidden state."""
        missing = self.config.memory_length + num_queries - k_BHSE.shape[2]
        if not missing and padding_BS is None:
            return k_BHSE, v_BHSE
        columns = missing + k_BHSE.shape[2]
        blank_k = self._split(self.k_proj(blank_D).expand(1, columns, -1))
        blank_v = self._split(self.v_proj(blank_D).expand(1, columns, -1))
        if self.config.position == "rotary":
            blank_k = rotate(blank_k, start - missing)
        shape = (k_BHSE.shape[0], -1, -1, -1)
        k = torch.cat([blank_k[:, :, :missing].expand(shape), k_BHSE], dim=2)
        v = torch.cat([blank_v[:, :, :missing].expand(shape), v_BHSE], dim=2)
        if padding_BS is not None:
            is_blank = nn.functional.pad(padding_BS[:, -k_BHSE.shape[2] :], (missing, 0))[:, None, :, None]
            k, v = torch.where(is_blank, blank_k, k), torch.where(is_blank, blank_v, v)
        return k, v


class AllAttentionLayer(GradientCheckpointingLayer):
    """Pre-norm, attention, dropout, residual."""

    def __init__(self, config: AllAttentionConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AllAttention(config, layer)
        self.dropout = nn.Dropout(config.hidden_dropout)

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
            self.norm(torch.zeros_like(hidden_BTD[0, 0])),
            positions_WD,
            shared_bias,
            padding_BS,
            past_key_values,
            need_weights,
        )
        return hidden_BTD + self.dropout(attended), weights


class AllAttentionPreTrainedModel(PreTrainedModel):
    """Loading, saving and first values."""

    config: AllAttentionConfig
    config_class = AllAttentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AllAttentionLayer"]
    _skip_keys_device_placement = ["past_key_values", "memory"]
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its own dispatch in the source; ours chooses in `AllAttention.forward`.
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; then the model computes what the saved one did, bit for bit.

        Tensors lie in the file's memory map at any address, but the last bit of a product depends on whether its
        operands are aligned as torch's own are. Those that are not are copied, one at a time.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        spread = config.initializer_range or config.hidden_size**-0.5
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=spread)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=spread)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, OutputBias):
            init.zeros_(module.bias)
        elif isinstance(module, AllAttention) and module.heads:
            # As they enter the layer, √E m^k and √N m^v, they then have unit variance.
            init.normal_(module.persistent_k, std=config.head_dim**-0.5)
            init.normal_(module.persistent_v, std=config.num_persistent**-0.5)
        for name in ("content_bias", "position_bias"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.zeros_(getattr(module, name))
        if isinstance(table := getattr(module, "position_table", None), nn.Parameter):
            init.normal_(table, std=1.0)


class AllAttentionModel(AllAttentionPreTrainedModel):
    """Embeddings, layers and the last norm, without an output layer."""

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__(config)
        width, cutoffs = config.hidden_size, config.adaptive_cutoffs
        self.embed_tokens: nn.Module = (
            nn.Embedding(config.vocab_size, width)
            if cutoffs is None
            else AdaptiveEmbedding(config.vocab_size, width, cutoffs, config.adaptive_factor)
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        if config.position == "learned":
            self.position_table = nn.Parameter(torch.empty(config.memory_length + 1, width))
        if config.position != "rotary" and config.share_position_bias:
            self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
            self.position_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
        self.layers = nn.ModuleList(AllAttentionLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding module."""
        self.embed_tokens = value

    def _positions(self, hidden_BTD: Tensor) -> Tensor | None:
        if self.config.position == "learned":
            return self.position_table
        if self.config.position == "sinusoidal":
            table = sinusoidal_table(self.config.memory_length + 1, self.config.hidden_size)
            return table.to(device=hidden_BTD.device, dtype=hidden_BTD.dtype)
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        memory: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> AllAttentionOutput:
        """Run the layers.

        Args:
            input_ids: (B, T).
            attention_mask: (B, ≥ T), 0 where a position is padding (left padding); None if none is.
            past_key_values: keys and values of the positions before, for evaluation.
            memory: `memory` of the segment before, for training; each layer's states of (B, P ≤ M, D).
            inputs_embeds: (B, T, D) instead of `input_ids`.
            use_cache: whether to return a cache; by default in evaluation without memory.
            output_attentions: whether to return each layer's weights (B, H, T, S + N).
            output_hidden_states: whether to return the embeddings and each layer's output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, one of the two.")
        if memory is not None and past_key_values is not None:
            raise ValueError("Give either memory (training) or past_key_values (evaluation), not both.")
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache and not self.training and memory is None
        if use_cache and past_key_values is None and memory is None:
            past_key_values = DynamicCache(config=config)
        embedded = self.embed_tokens(input_ids) * config.hidden_size**0.5 if inputs_embeds is None else inputs_embeds
        hidden = self.embedding_dropout(embedded)
        padding_BS = None
        if attention_mask is not None and not bool(attention_mask.all()):
            padding_BS = attention_mask == 0
        positions_WD = self._positions(hidden)
        shared_bias = (self.content_bias, self.position_bias) if hasattr(self, "content_bias") else None
        if memory is None and past_key_values is None and config.attend_initial_memory:
            memory = (hidden.new_zeros((hidden.shape[0], config.memory_length, config.hidden_size)),) * len(self.layers)
        if memory is not None and padding_BS is not None:
            # Columns that the mask does not speak of lie before the text, in the memory.
            columns = memory[0].shape[1] + hidden.shape[1]
            padding_BS = nn.functional.pad(padding_BS, (max(0, columns - padding_BS.shape[1]), 0))
        next_memory: list[Tensor] = []
        all_hidden, all_weights = [hidden], []
        for index, layer in enumerate(self.layers):
            before = None if memory is None else memory[index]
            if past_key_values is None:
                kept = hidden if before is None else torch.cat([before, hidden], dim=1)
                next_memory.append(kept[:, -config.memory_length :].detach())
            hidden, weights = layer(
                hidden,
                before,
                positions_WD,
                shared_bias,
                padding_BS=padding_BS,
                past_key_values=past_key_values,
                need_weights=bool(output_attentions),
            )
            all_hidden.append(hidden)
            all_weights.append(weights)
        hidden = self.output_dropout(self.norm(hidden))
        return AllAttentionOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            memory=None if past_key_values is not None else tuple(next_memory),
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


class AllAttentionForCausalLM(AllAttentionPreTrainedModel, GenerationMixin):
    """The language model: plain output layer (tied by default) or adaptive softmax."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__(config)
        self.model = AllAttentionModel(config)
        width, cutoffs = config.hidden_size, config.adaptive_cutoffs
        if cutoffs is None:
            self.lm_head: nn.Module = nn.Linear(width, config.vocab_size, bias=config.lm_head_bias)
        else:
            self.lm_head = AdaptiveSoftmax(
                config.vocab_size, width, cutoffs, config.adaptive_factor, bias=config.lm_head_bias
            )
            # Tables and tail projections are shared with the input, the shortlist's projections are not.
            shared = [f"tables.{rank}.weight" for rank in range(len(cutoffs) + 1)]
            shared += [f"projections.{rank + 1}.weight" for rank in range(len(cutoffs))]
            self._tied_weights_keys = {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in shared}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        memory: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> AllAttentionCausalLMOutput:
        """Return logits, and the mean negative log-likelihood where labels are given.

        Args:
            input_ids: (B, T).
            attention_mask: see `AllAttentionModel.forward`, as for the arguments that are not named here.
            past_key_values: the cache.
            memory: the segment memory.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            labels: (B, T), the inputs themselves; they are shifted here, −100 is ignored.
            shift_labels: (B, T), each position's next token, for texts that go on in the next segment; goes first.
            use_cache: whether to return a cache.
            output_attentions: whether to return attention weights.
            output_hidden_states: whether to return hidden states.
            logits_to_keep: compute only the last so many positions' logits (0: all), or those at these indices.
            num_items_in_batch: divide the summed loss by this instead of taking the mean.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            memory=memory,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BTD = outputs.last_hidden_state[:, keep]
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        loss = logits = None
        if shift_labels is not None and isinstance(self.lm_head, AdaptiveSoftmax):
            # The loss needs only the bands its targets are in; scoring the whole vocabulary would cost far more.
            is_target = shift_labels != -100
            nll = self.lm_head.loss(hidden_BTD, shift_labels.clamp(min=0)) * is_target
            loss = nll.sum() / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)
        else:
            logits = self.lm_head(hidden_BTD)
        if shift_labels is not None and logits is not None:
            loss = self.loss_function(
                logits,
                labels,
                self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels.contiguous(),
            )
        return AllAttentionCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            memory=outputs.memory,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
