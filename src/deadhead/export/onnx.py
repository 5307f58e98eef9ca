"""Write a language model as an ONNX file with its key/value cache, and what onnxruntime-genai needs.

What is exported is a function of plain tensors, with the cache going in and coming out.

Dimensions: B texts, T new tokens, P tokens before, S = P + T, V vocabulary; G key/value heads and E their width, each
layer's own. In the All-attention Transformer's, M memory, and M + T columns that the new tokens can see together.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from deadhead.errors import UnsupportedModel
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.all_attention.adaptive import AdaptiveEmbedding
from deadhead.models.all_attention.attention import Operands, eager_attention
from deadhead.models.all_attention.positions import rotate
from deadhead.models.pruned.structure import emptied

FILE = "model.onnx"
GENAI_FILE = "genai_config.json"
_OPSET = 18
_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Any sizes but 0 and 1, which the exporter would take for constants, all different, so that none is taken for another.
_BATCH, _NEW, _PAST = 2, 3, 5


class FlatModel(nn.Module):
    """A language model with its cache as tensors (B, G, P, E), the keys and the values of each layer that has heads.

    `cache` has their G and E by name, such as "3.key"; `layers` are the layers they are of.
    """

    def __init__(self, model: PreTrainedModel, cache: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(cache)
        self.cache = {
            f"{layer}.{kind}": size
            for layer, sizes in cache.items()
            for kind, size in zip(("key", "value"), sizes, strict=True)
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits (B, T, V) and the cache with the new tokens; `past` are `cache`'s tensors.

        `input_ids` and `position_ids` are (B, T), `attention_mask` is (B, S), 0 where a position is padding.
        """
        raise NotImplementedError


def flat_model(model: PreTrainedModel) -> FlatModel:
    """Return a model with its cache as tensors.

    Raises:
        UnsupportedModel: it is no language model with such a cache.
    """
    if not model.can_generate():
        raise UnsupportedModel(
            f"A language model that continues texts was expected, but {type(model).__name__} does not; only such are "
            "exported."
        )
    if isinstance(model, AllAttentionForCausalLM):
        config = model.config
        heads = [config.layer_heads(layer) for layer in range(config.num_hidden_layers)]
        sizes = {layer: [(len(left), config.head_dim)] * 2 for layer, left in enumerate(heads) if left}
        return _FlatAllAttention(model, sizes)
    return _FlatHuggingFace(model, _cache_of(model))


@torch.no_grad()
def _cache_of(model: PreTrainedModel) -> dict[int, list[tuple[int, int]]]:
    """Return the sizes of each layer's keys and values, by running the model once."""
    cache = DynamicCache(config=model.config)
    empty = {getattr(module, "layer_idx", None) for module in emptied(model).values()}
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    found: dict[int, list[tuple[int, int]]] = {}
    for index, layer in enumerate(cache.layers):
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        sizes = [(t.shape[1], t.shape[3]) for t in tensors if isinstance(t, Tensor) and t.ndim == 4]
        if len(sizes) < 2:
            kind = type(layer).__name__
            raise UnsupportedModel(
                f"Layer {index} of this model keeps a {kind}, not keys and values; such models are not exported."
            )
        if index not in empty:
            found[index] = sizes
    return found


class _GivenCache(Cache):
    """A cache of given tensors, which keeps the longer ones in `present`."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]], length: Any, num_layers: int) -> None:
        super().__init__(layers=[])
        self.past, self.length, self.num_layers = past, length, num_layers
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.past:
            return key_states, value_states
        keys, values = self.past[layer_idx]
        self.present[layer_idx] = (torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2))
        return self.present[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    def __len__(self) -> int:
        return self.num_layers


class _FlatHuggingFace(FlatModel):
    """A model of transformers; it is given its mask whole, so that none is made in a way that cannot be traced."""

    def __init__(self, model: PreTrainedModel, cache: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        super().__init__(model, cache)
        config: Any = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        self.window: int | None = getattr(config, "sliding_window", None)
        usual = "full_attention" if self.window is None else "sliding_attention"
        kinds = set(getattr(config, "layer_types", None) or [usual])
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(
                f"This model has layers of type {sorted(unknown)[0]}, and only full and sliding attention are exported."
            )
        self.kinds = sorted(kinds)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        new = input_ids.shape[1]
        before = attention_mask.shape[1] - new
        masks = {kind: self._mask(attention_mask, before, new, kind) for kind in self.kinds}
        pairs = dict(zip(self.layers, zip(past[::2], past[1::2], strict=True), strict=True))
        cache = _GivenCache(pairs, before, self.num_layers)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=masks if len(masks) > 1 else masks[self.kinds[0]],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits.float(), *(tensor for layer in self.layers for tensor in cache.present[layer]))

    def _mask(self, attention_mask: Tensor, before: int, new: int, kind: str) -> Tensor:
        """Return what is added to the scores, (B, 1, T, S)."""
        column_S = torch.arange(before + new, device=attention_mask.device)
        row_T1 = torch.arange(new, device=attention_mask.device)[:, None] + before
        seen = column_S <= row_T1
        if kind == "sliding_attention":
            assert self.window is not None
            seen = seen & (row_T1 - column_S < self.window)
        seen = seen[None, None] & attention_mask.bool()[:, None, None, :]
        return torch.where(seen, 0.0, torch.finfo(self.model.dtype).min)


class _FlatAllAttention(FlatModel):
    """The All-attention Transformer, and Transformer-XL: of the ways its attention has, the plain one.

    Rotary positions are counted in columns, padding included: only their differences matter.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        model: Any = self.model.model
        config = self.model.config
        new, memory = input_ids.shape[1], config.memory_length
        before = past[0].shape[2] if past else attention_mask.shape[1] - new
        hidden = _embed(model.embed_tokens, input_ids) * config.hidden_size**0.5
        # Of the last M + T columns, where no token stands, those before the first token included.
        absent = functional.pad(attention_mask[:, -(before + new) :] == 0, (memory, 0), value=True)[:, before:]
        shared = (model.content_bias, model.position_bias) if hasattr(model, "content_bias") else None
        positions_WD = model._positions(hidden)
        u_HE = v_HE = r_HWE = None
        given, present = iter(past), []
        for layer in model.layers:
            attention, attended = layer.attention, layer.norm(hidden)
            if attention.heads:
                projections = attention.q_proj, attention.k_proj, attention.v_proj
                plain_queries, keys, values = (attention._project(part, attended, None) for part in projections)
                queries = plain_queries
                if attention.is_rotary:
                    queries, keys = rotate(queries, before), rotate(keys, before)
                keys, values = (torch.cat([next(given), tensor], dim=2) for tensor in (keys, values))
                present += [keys, values]
                keys, values = (functional.pad(tensor, (0, 0, memory, 0))[:, :, before:] for tensor in (keys, values))
                if config.attend_initial_memory:
                    blank = layer.norm(torch.zeros_like(hidden[0, 0]))
                    keys, values = attention._with_blanks(keys, values, blank, absent, 0, before - memory, None)
                if positions_WD is not None:
                    u_HE, v_HE = attention._biases(shared)
                    r_HWE = attention._project(attention.r_proj, positions_WD[None], None)[0]
                persistent_k, persistent_v, z_N = attention._persistent(queries, None)
                if not attention.num_persistent:
                    # OpenVINO takes no empty tensors: one vector, which its gate keeps out of the softmax.
                    persistent_k = persistent_v = queries.new_zeros((len(attention.heads), 1, attention.head_dim))
                    z_N = queries.new_zeros(1)
                operands = Operands(
                    q_BHTE=queries,
                    persistent_q_BHTE=plain_queries,
                    k_BHSE=keys,
                    v_BHSE=values,
                    r_HWE=r_HWE,
                    content_bias_HE=u_HE,
                    position_bias_HE=v_HE,
                    persistent_k_HNE=persistent_k,
                    persistent_v_HNE=persistent_v,
                    persistent_scale=attention.persistent_scale,
                    window=memory + 1,
                    padding_BS=None if config.attend_initial_memory else absent,
                    z_N=z_N,
                )
                attended = eager_attention(operands)[0].flatten(-2)
            hidden = layer.feed_forward(hidden + attention.o_proj(attended))
        logits = self.model.lm_head(model.norm(hidden))
        return (logits.float(), *present)


def _embed(embedding: Any, input_ids: Tensor) -> Tensor:
    """Look up every word in every band, where the model itself looks only into the band that it is in."""
    if not isinstance(embedding, AdaptiveEmbedding):
        return embedding(input_ids)
    parts = []
    for (start, stop), table, projection in zip(embedding.bands, embedding.tables, embedding.projections, strict=True):
        is_here = (input_ids >= start) & (input_ids < stop)
        found = projection(table((input_ids - start).clamp(0, stop - start - 1)))
        parts.append(torch.where(is_here[..., None], found, 0.0))
    return torch.stack(parts).sum(0)


@torch.no_grad()
def write_onnx(model: FlatModel, path: Path) -> None:
    """Write the file of a model in evaluation mode; weights beyond 2 GB lie in one beside it.

    Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key|value` of the layers i that
    have heads, outputs `logits` and `present.{i}.key|value`; batch and lengths are free.

    Raises:
        UnsupportedModel: PyTorch's exporter cannot trace the model.
    """
    past = tuple(torch.randn(_BATCH, heads, _PAST, width) for heads, width in model.cache.values())
    mask = torch.ones((_BATCH, _PAST + _NEW), dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    inputs = (torch.zeros((_BATCH, _NEW), dtype=torch.long), mask, positions, *past)
    new, whole = {0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}
    shapes = (new, whole, new, *([tuple({0: "batch", 2: "past"} for _ in past)] if past else []))
    # The exporter speaks of its own deprecations and of operators of packages that are not there.
    exporter = logging.getLogger("torch.onnx._internal.exporter")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[*_INPUTS, *(f"past_key_values.{name}" for name in model.cache)],
                output_names=["logits", *(f"present.{name}" for name in model.cache)],
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever the model does that the tracer does not know
        raise UnsupportedModel(
            f"{type(model.model).__name__} cannot be exported to ONNX: PyTorch's exporter stopped with a "
            f"{type(error).__name__}."
        ) from error
    finally:
        exporter.setLevel(level)
    assert program is not None
    program.save(str(path))


def genai_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return what onnxruntime-genai must be told to continue texts with the file: the content of `genai_config.json`.

    The numbers of heads stand there once for all layers; genai takes each layer's own from the file's inputs.
    """
    config: Any = model.config.get_text_config()
    generation: Any = model.generation_config
    special = {name: getattr(generation, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = getattr(config, "max_position_embeddings", None) or 2**17
    heads = config.num_attention_heads
    return {
        "model": {
            # Its name for any decoder that takes token ids, a mask, positions and a cache.
            "type": "decoder",
            "context_length": length,
            "vocab_size": config.vocab_size,
            **{name: token for name, token in special.items() if token is not None},
            "decoder": {
                "session_options": {},
                "filename": FILE,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **{name: name for name in _INPUTS},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The cache is a new tensor each time: one that is shared would have to be of the greatest length.
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
