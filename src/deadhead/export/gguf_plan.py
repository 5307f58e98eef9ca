"""How a model of the Llama family, cut or not, goes into a GGUF file: llama.cpp's architecture, and each layer's sizes.

Where all layers are alike, it is the model's own architecture; where they differ, `deci` takes numbers of heads and
hidden units for each layer, and `openelm` does so for models that norm queries and keys. A layer without heads stays
one in `deci`, but for the first; elsewhere, and for a feed-forward layer without hidden units, stands one of zeros.

Dimensions: D width, H heads, G key/value heads, E head width, F hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.models.pruned.modeling_pruned import TYPE_PREFIX, PrunedModel

BLOCK = 32
"""Numbers of a block of Q8_0, and so the least hidden units of a layer of zeros."""

# Model type → llama.cpp's architecture where all layers are alike.
_NATIVE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Types that norm queries and keys.
_NORMED = ("qwen3",)
# Architectures that take factors for the rotary frequencies.
_FACTORS = ("llama", "deci")


@dataclass(frozen=True)
class LayerShape:
    """One layer in the file: H, G and F; H and G are 0 only where the architecture takes it."""

    heads: int
    kv_heads: int
    units: int


@dataclass(frozen=True)
class GgufPlan:
    """How a model goes into a file: as llama.cpp's `architecture`, with or without norms of queries and keys.

    `rope_factors` (E / 2,) are what each rotary frequency is divided by; None where all are 1.
    """

    architecture: str
    layers: tuple[LayerShape, ...]
    head_dim: int
    has_norms: bool
    rope_factors: Tensor | None


def plan_file(model: PreTrainedModel) -> GgufPlan:
    """Return how a model goes into a file.

    Raises:
        UnsupportedModel: none of llama.cpp's architectures can say it; the message says why.
    """
    config: Any = model.config
    kind = config.model_type.removeprefix(TYPE_PREFIX)
    if kind not in _NATIVE:
        raise UnsupportedModel(
            f"A model of type {kind} cannot be written as GGUF: llama.cpp takes layers of different sizes for "
            f"{', '.join(_NATIVE)} only. Export it with --to onnx"
            + (", or with --to padded and convert that." if isinstance(model, PrunedModel) else ".")
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        kind == "mistral" and config.sliding_window is not None
    ):
        raise _refusal(kind, "attends to a sliding window, which that architecture of llama.cpp does not have")
    if config.hidden_act != "silu":
        raise _refusal(kind, f"has the activation {config.hidden_act}, where llama.cpp has silu")
    layers = list(model.get_decoder().layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = [_shape(layer, head_dim) for layer in layers]
    factors = _rope_factors(model, kind)
    architecture = _architecture(config, kind, shapes, head_dim, has_factors=factors is not None)
    written = tuple(
        _written(shape, layer, index, architecture)
        for index, (shape, layer) in enumerate(zip(shapes, layers, strict=True))
    )
    return GgufPlan(architecture, written, head_dim, kind in _NORMED, factors)


def _architecture(config: Any, kind: str, shapes: list[LayerShape], head_dim: int, *, has_factors: bool) -> str:
    """Return the narrowest of llama.cpp's architectures that can say the model."""
    first = shapes[0]
    alike = len(set(shapes)) == 1 and first.heads > 0 and first.units > 0
    # Llama.cpp's Qwen2 wants heads that fill the width.
    native = alike and (kind != "qwen2" or first.heads * head_dim == config.hidden_size)
    if native and not (has_factors and _NATIVE[kind] not in _FACTORS):
        return _NATIVE[kind]
    if kind not in _NORMED:
        return "deci"
    if has_factors:
        raise _refusal(kind, "scales its rotary frequencies, which that architecture of llama.cpp cannot say")
    if not config.tie_word_embeddings:
        raise _refusal(
            kind,
            "has an output layer of its own, which llama.cpp's one architecture with norms of queries and keys and "
            "layers of different sizes does not have",
        )
    return "openelm"


def _refusal(kind: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"This {kind} model {reason}, so it cannot be written as GGUF; export it with --to onnx.")


def _shape(layer: Any, head_dim: int) -> LayerShape:
    attention, down = layer.self_attn, layer.mlp.down_proj
    units = down.in_features if isinstance(down, nn.Linear) else 0
    if getattr(attention, "is_emptied", False):
        return LayerShape(0, 0, units)
    heads, kv_heads = (projection.out_features // head_dim for projection in (attention.q_proj, attention.k_proj))
    return LayerShape(heads, kv_heads, units)


def _written(shape: LayerShape, layer: Any, index: int, architecture: str) -> LayerShape:
    """Return the numbers in the file, where some layers that do nothing must be there as zeros."""
    if not shape.heads and (architecture != "deci" or index == 0 or layer.self_attn.o_proj.bias is not None):
        shape = replace(shape, heads=1, kv_heads=1)
    return replace(shape, units=shape.units or BLOCK)


def _rope_factors(model: PreTrainedModel, kind: str) -> Tensor | None:
    """Return what the plain frequencies are divided by, from those that the model has."""
    rotary: Any = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    parameters = model.config.rope_parameters
    is_known = parameters["rope_type"] in ("default", "linear", "llama3")
    if not is_known or parameters.get("partial_rotary_factor", 1) != 1:
        raise _refusal(kind, f"has rotary positions of type {parameters['rope_type']}, which are not written")
    found = rotary.inv_freq.float().cpu()
    plain = parameters["rope_theta"] ** -(torch.arange(len(found), dtype=torch.float32) / len(found))
    factors = plain / found
    return None if bool(((factors - 1).abs() < 1e-5).all()) else factors
