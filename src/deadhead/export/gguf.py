"""Write a model of the Llama family, cut or not, as a GGUF file for llama.cpp.

If all layers are alike, the file has the model's own architecture. If they differ, `deci` takes the numbers of heads
and hidden units of each layer, and `openelm` does so for models that norm queries and keys. In `deci` every layer but
the first may have no heads. Elsewhere, and for a feed-forward layer without hidden units, a layer of zeros is written.

Dimensions: D width, H heads, G key/value heads, E head width, F hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.models.pruned.modeling_pruned import TYPE_PREFIX, PrunedModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that are written here; what else there is, llama.cpp's own quantiser makes."""

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Numbers of a block of Q8_0, and so the least hidden units of a layer of zeros.
_BLOCK = 32

# Model type → llama.cpp's architecture where all layers are alike.
_NATIVE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Types that norm queries and keys.
_NORMED = ("qwen3",)
# Architectures that take factors for the rotary frequencies.
_FACTORS = ("llama", "deci")
# Architectures whose rotation turns neighbouring numbers, where transformers turns those half a head apart.
_NEIGHBOURS = ("llama", "deci")


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
        UnsupportedModel: none of llama.cpp's architectures can describe the model; the message says why.
    """
    config: Any = model.config
    kind = config.model_type.removeprefix(TYPE_PREFIX)
    if kind not in _NATIVE:
        raise UnsupportedModel(
            f"A model of type {kind} cannot be written as GGUF: llama.cpp takes layers of different sizes for "
            f"{', '.join(_NATIVE)} only. Export it to onnx (--to onnx)"
            + (", or to padded and convert that." if isinstance(model, PrunedModel) else ".")
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
    """Return the most specific of llama.cpp's architectures that can describe the model."""
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
    return UnsupportedModel(
        f"This {kind} model {reason}, so it cannot be written as GGUF; export it to onnx (--to onnx)."
    )


def _shape(layer: Any, head_dim: int) -> LayerShape:
    attention, down = layer.self_attn, layer.mlp.down_proj
    units = down.in_features
    if getattr(attention, "is_emptied", False):
        return LayerShape(0, 0, units)
    heads, kv_heads = (projection.out_features // head_dim for projection in (attention.q_proj, attention.k_proj))
    return LayerShape(heads, kv_heads, units)


def _written(shape: LayerShape, layer: Any, index: int, architecture: str) -> LayerShape:
    """Return the numbers in the file, in which some layers that do nothing must be written as zeros."""
    if not shape.heads and (architecture != "deci" or index == 0 or layer.self_attn.o_proj.bias is not None):
        shape = replace(shape, heads=1, kv_heads=1)
    return replace(shape, units=shape.units or _BLOCK)


def _rope_factors(model: PreTrainedModel, kind: str) -> Tensor | None:
    """Return the divisors of the plain frequencies, given the model's frequencies."""
    rotary: Any = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    parameters = model.config.rope_parameters
    is_known = parameters["rope_type"] in ("default", "linear", "llama3")
    if not is_known or parameters.get("partial_rotary_factor", 1) != 1:
        raise _refusal(kind, f"has rotary positions of type {parameters['rope_type']}, which are not written")
    found = rotary.inv_freq.float().cpu()
    plain = parameters["rope_theta"] ** -(torch.arange(len(found), dtype=torch.float32) / len(found))
    factors = plain / found
    return None if bool(((factors - 1).abs() < 1e-5).all()) else factors


def write_gguf(
    model: PreTrainedModel, path: Path, plan: GgufPlan, *, kind: str, name: str, tokenizer: dict[str, Any] | None = None
) -> None:
    """Write a model as `plan_file` planned it, one tensor after the other.

    `kind` is one of `TYPES`, `name` a title for people, `tokenizer` what `read_tokenizer` returns.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        writer.add_name(name)
        writer.add_block_count(len(plan.layers))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        heads, kv_heads, units = map(list, zip(*(astuple(layer) for layer in plan.layers), strict=True))
        alike = len(set(plan.layers)) == 1
        writer.add_feed_forward_length(units[0] if alike else units)
        writer.add_head_count(heads[0] if alike else heads)
        writer.add_head_count_kv(kv_heads[0] if alike else kv_heads)
        writer.add_key_length(plan.head_dim)
        writer.add_value_length(plan.head_dim)
        writer.add_rope_dimension_count(plan.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        for field, value in (tokenizer or {"tokenizer_model": "none"}).items():
            getattr(writer, f"add_{field}")(value)
        # Twice over: a file begins with the shapes of all, and no more than one is to be in memory.
        for label, tensor in _tensors(model, plan):
            wanted = _type_of(tensor.shape, kind)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, wanted)
            writer.add_tensor_info(label, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model, plan):
            values = tensor.detach().float().contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(values, _type_of(tensor.shape, kind)))
    finally:
        writer.close()


def _type_of(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return types.F16
    return types[kind.upper()]


def interleave_halves(tensor: Tensor, heads: int) -> Tensor:
    """Put rows that are rotated together side by side, (H · E, …): i and i + E/2 of each head become 2i and 2i + 1."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _tensors(model: PreTrainedModel, plan: GgufPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file, by llama.cpp's name."""
    decoder: Any = model.get_decoder()
    yield "token_embd.weight", decoder.embed_tokens.weight
    yield "output_norm.weight", decoder.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.get_output_embeddings().weight
    if plan.rope_factors is not None:
        yield "rope_freqs.weight", plan.rope_factors
    for index, (layer, shape) in enumerate(zip(decoder.layers, plan.layers, strict=True)):
        block, width = f"blk.{index}", model.config.hidden_size
        if shape.heads:
            yield f"{block}.attn_norm.weight", layer.input_layernorm.weight
            yield from _attention(block, layer.self_attn, shape, plan, width)
        yield f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight
        yield from _feed_forward(block, layer.mlp, shape, width)


def _attention(
    block: str, attention: Any, shape: LayerShape, plan: GgufPlan, width: int
) -> Iterator[tuple[str, Tensor]]:
    is_empty = getattr(attention, "is_emptied", False)
    counts = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    for part in ("weight", "bias"):
        found: dict[str, Tensor] = {}
        if not is_empty:
            given = {letter: getattr(getattr(attention, f"{letter}_proj"), part) for letter in counts}
            found = {letter: tensor for letter, tensor in given.items() if tensor is not None}
        elif part == "weight":
            found = {letter: _zeros(count * plan.head_dim, width) for letter, count in counts.items()}
        if plan.architecture == "openelm" and found:
            yield f"{block}.attn_qkv.{part}", torch.cat(tuple(found.values()))
            continue
        for letter, tensor in found.items():
            is_turned = letter in "qk" and plan.architecture in _NEIGHBOURS
            yield f"{block}.attn_{letter}.{part}", interleave_halves(tensor, counts[letter]) if is_turned else tensor
    output = _zeros(width, shape.heads * plan.head_dim) if is_empty else attention.o_proj.weight
    yield f"{block}.attn_output.weight", output
    if attention.o_proj.bias is not None:
        yield f"{block}.attn_output.bias", attention.o_proj.bias
    for letter in "qk" if plan.has_norms else "":
        norm = _zeros(plan.head_dim) if is_empty else getattr(attention, f"{letter}_norm").weight
        yield f"{block}.attn_{letter}_norm.weight", norm


def _feed_forward(block: str, mlp: Any, shape: LayerShape, width: int) -> Iterator[tuple[str, Tensor]]:
    is_empty = not mlp.down_proj.in_features
    for part in ("gate", "up", "down"):
        size = (width, shape.units) if part == "down" else (shape.units, width)
        module = getattr(mlp, f"{part}_proj")
        yield f"{block}.ffn_{part}.weight", _zeros(*size) if is_empty else module.weight
        if getattr(module, "bias", None) is not None:
            yield f"{block}.ffn_{part}.bias", module.bias


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)
