"""The All-attention Transformer (Sukhbaatar et al. 2019) with relative positions and segment memory (Dai et al. 2019).

A layer is  h ← h + Dropout(W_O · concat_h head_h(LN(h), LN(memory)) + b_O).  There is no feed-forward layer. Instead
every head owns N persistent key/value vectors, which share one softmax with the context. With r = W_R p:

    content (q + u)·k      position (q + v)·r_{i−j}      persistent q·(√E m^k)      all / √E,      values v and √N m^v

Every query sees exactly memory + 1 positions ("same length" attention). So training, which carries hidden states from
segment to segment, and evaluation, which carries keys and values in a sliding cache, compute the same function.

With `feed_forward_size` and without persistent vectors the same code is a Transformer-XL. If its feed-forward layers
have as many hidden units as there would be persistent vectors, both models have the same number of weights, except for
those layers' biases and norms.

Layers may differ in their numbers of heads, of persistent vectors in each head, and of hidden units:
`config.head_plan` names those that are left. A layer without heads adds b_O.

Dimensions: B batch, T queries, P past, S context = P + T, M memory, W window = M + 1, H heads, D width, E head width,
N persistent vectors, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .cache import append_in_place
from .configuration import AllAttentionConfig, TransformerXLConfig
from .dropout import Dropout
from .layer import AllAttention, AllAttentionLayer
from .positions import sinusoidal_table
from .projection import project

# Bytes; torch allocates every tensor at a multiple of it.
_ALIGNMENT = 64


@dataclass
class AllAttentionOutput(ModelOutput):
    """The output of the model, and of the language model. With an adaptive softmax, `logits` are log-probabilities.

    Without a cache, `memory` holds each layer's last M inputs: L tensors of (B, ≤ M, D).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    memory: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None


class AllAttentionPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial values."""

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
        """Load as transformers does, then align as torch does what lies in the file's memory map at any address.

        The last bit of a product depends on it; so the model computes what the saved one did, bit for bit.
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
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=spread)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, AllAttention) and module.num_persistent:
            # As they enter the layer, √E m^k and √N m^v, they then have unit variance.
            init.normal_(module.persistent_k, std=config.head_dim**-0.5)
            init.normal_(module.persistent_v, std=config.num_persistent**-0.5)
        for name in ("bias", "content_bias", "position_bias"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.zeros_(getattr(module, name))
        if isinstance(table := getattr(module, "position_table", None), nn.Parameter):
            init.normal_(table, std=1.0)


class AllAttentionModel(AllAttentionPreTrainedModel):
    """Embeddings, layers and the last norm, without an output layer."""

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__(config)
        width, cutoffs, size = config.hidden_size, config.adaptive_cutoffs, config.vocab_size
        self.embed_tokens: nn.Module = nn.Embedding(size, width) if cutoffs is None else AdaptiveEmbedding(config)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        if config.position == "learned":
            self.position_table = nn.Parameter(torch.empty(config.memory_length + 1, width))
        if config.position != "rotary" and config.share_position_bias:
            self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
            self.position_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
        self.layers = nn.ModuleList(AllAttentionLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        self.output_dropout = Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def _positions(self, hidden_BTD: Tensor) -> Tensor | None:
        if self.config.position == "learned":
            return self.position_table
        if self.config.position == "sinusoidal":
            return sinusoidal_table(self.config.memory_length + 1, self.config.hidden_size).to(hidden_BTD)
        return None

    @can_return_tuple
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
        """Run the layers. For an option that is None, the configuration decides.

        Args:
            input_ids: tokens, (B, T).
            attention_mask: (B, ≥ T), 0 where a position is padding, which must be on the left; None if none is.
            past_key_values: keys and values of the positions before, for evaluation.
            memory: `memory` of the segment before, for training: each layer's states, (B, P ≤ M, D).
            inputs_embeds: (B, T, D), in place of `input_ids`: outputs of the embedding layer, not yet scaled by √D.
            use_cache: whether to return a cache; by default it is returned in evaluation without memory.
            output_attentions: whether to return each layer's attention weights, (B, H, T, S + N).
            output_hidden_states: whether to return the embeddings and each layer's output.

        Returns:
            The output; with `return_dict=False` a tuple of all its values that are not None.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, one of the two.")
        if memory is not None and past_key_values is not None:
            raise ValueError("Give either memory (training) or past_key_values (evaluation), not both.")
        config = self.config
        need_weights = bool(config.output_attentions if output_attentions is None else output_attentions)
        need_hidden = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if past_key_values is None and use_cache and memory is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            append_in_place(past_key_values)
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.embedding_dropout(embedded * config.hidden_size**0.5)
        positions_WD = self._positions(hidden)
        shared_bias = (self.content_bias, self.position_bias) if hasattr(self, "content_bias") else None
        if memory is None and past_key_values is None and config.attend_initial_memory:
            memory = (hidden.new_zeros((hidden.shape[0], config.memory_length, config.hidden_size)),) * len(self.layers)
        columns = 0 if memory is None else memory[0].shape[1] + hidden.shape[1]
        padding_BS = _padding(attention_mask, columns)
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
                need_weights=need_weights,
            )
            all_hidden.append(hidden)
            all_weights.append(weights)
        hidden = self.output_dropout(self.norm(hidden))
        return AllAttentionOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            memory=None if past_key_values is not None else tuple(next_memory),
            hidden_states=tuple(all_hidden) if need_hidden else None,
            attentions=tuple(all_weights) if need_weights else None,
        )


def _padding(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """Return which columns are padding, (B, ≥ columns), or None if none is; memory beyond the mask is no padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return nn.functional.pad(attention_mask == 0, (max(0, columns - attention_mask.shape[1]), 0))


class AllAttentionForCausalLM(AllAttentionPreTrainedModel, GenerationMixin):
    """The language model: plain output layer (tied by default) or adaptive softmax."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__(config)
        self.model = AllAttentionModel(config)
        cutoffs = config.adaptive_cutoffs
        if cutoffs is None:
            self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        else:
            self.lm_head = AdaptiveSoftmax(config)
            # Tables and tail projections are shared with the input, the shortlist's projections are not.
            shared = [f"tables.{rank}.weight" for rank in range(len(cutoffs) + 1)]
            shared += [f"projections.{rank + 1}.weight" for rank in range(len(cutoffs))]
            self._tied_weights_keys = {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in shared}
        self.post_init()

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Return the padding mask as it is: the layers apply the window themselves, also with static caches."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        memory: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> AllAttentionOutput:
        """Return logits, and with labels the mean negative log-likelihood in nats; see `AllAttentionModel.forward`.

        - `labels`, (B, T), are the inputs themselves: they are shifted here, and −100 is ignored.
        - `shift_labels`, (B, T), are each position's next token, for texts that continue in the next segment; they
          take precedence over `labels`.
        - `logits_to_keep` is the number of last positions that get logits (0: all), or their indices.
        - `num_items_in_batch`, if given, divides the summed loss.
        """
        outputs = self.model(
            input_ids, attention_mask, past_key_values, memory, inputs_embeds, return_dict=True, **kwargs
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
            logits = project(self.lm_head, hidden_BTD)
        if shift_labels is not None and logits is not None:
            numbers = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels.contiguous()}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **numbers)
        return replace(outputs, loss=loss, logits=logits, last_hidden_state=None)


class TransformerXLModel(AllAttentionModel):
    """Embeddings, layers and the last norm of a Transformer-XL."""

    config_class = TransformerXLConfig


class TransformerXLForCausalLM(AllAttentionForCausalLM):
    """The language model of a Transformer-XL."""

    config_class = TransformerXLConfig


# Trainer shifts labels, and pipelines accept models, by the names in these tables.
for _config, _model, _causal in (
    (AllAttentionConfig, AllAttentionModel, AllAttentionForCausalLM),
    (TransformerXLConfig, TransformerXLModel, TransformerXLForCausalLM),
):
    MODEL_MAPPING_NAMES[_config.model_type] = _model.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _causal.__name__
