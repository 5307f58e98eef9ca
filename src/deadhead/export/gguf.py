"""Write a model of the Llama family, cut or not, as a GGUF file for llama.cpp.

Dimensions: D width, H heads, G key/value heads, E head width, F hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.export.gguf_plan import BLOCK, GgufPlan, LayerShape

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that are written here; what else there is, llama.cpp's own quantiser makes."""

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    model: PreTrainedModel, path: Path, plan: GgufPlan, *, kind: str, name: str, tokenizer: dict[str, Any] | None = None
) -> None:
    """Write a model as `gguf_plan.plan_file` planned it, one tensor after the other.

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
        _write_tensors(model, plan, writer, kind)
    finally:
        writer.close()


def _write_tensors(model: PreTrainedModel, plan: GgufPlan, writer: GGUFWriter, kind: str) -> None:
    import gguf

    # Twice over: a file begins with the shapes of all, and no more than one is to be in memory.
    for name, tensor in _tensors(model, plan):
        wanted = _type_of(tensor.shape, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, wanted)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model, plan):
        values = tensor.detach().float().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(values, _type_of(tensor.shape, kind)))


def _type_of(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % BLOCK:
        return types.F16
    return types[kind.upper()]


# Architectures whose rotation turns neighbouring numbers, where transformers turns those half a head apart.
_NEIGHBOURS = ("llama", "deci")


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
        if is_empty:
            zeros = {letter: _zeros(count * plan.head_dim, width) for letter, count in counts.items()}
            found: dict[str, Tensor] = zeros if part == "weight" else {}
        else:
            given = {letter: getattr(getattr(attention, f"{letter}_proj"), part) for letter in counts}
            found = {letter: tensor for letter, tensor in given.items() if tensor is not None}
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
    is_empty = not isinstance(mlp.down_proj, nn.Linear)
    for part in ("gate", "up", "down"):
        size = (width, shape.units) if part == "down" else (shape.units, width)
        module = getattr(mlp, f"{part}_proj")
        yield f"{block}.ffn_{part}.weight", _zeros(*size) if is_empty else module.weight
        if getattr(module, "bias", None) is not None:
            yield f"{block}.ffn_{part}.bias", module.bias


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)
