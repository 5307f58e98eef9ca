"""Write a model of the Llama family, cut or not, as a GGUF file for llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from deadhead.export.gguf_plan import BLOCK, GgufPlan
from deadhead.export.gguf_tensors import stored_tensors
from deadhead.export.gguf_tokenizer import GgufTokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that are written here; what else there is, llama.cpp's own quantiser makes."""

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    model: PreTrainedModel, path: Path, plan: GgufPlan, *, kind: str, name: str, tokenizer: GgufTokenizer | None = None
) -> None:
    """Write a model as `gguf_plan.plan_file` planned it, one tensor after the other.

    `kind` is one of `TYPES`, `name` a title for people.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        writer.add_name(name)
        writer.add_block_count(len(plan.layers))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        alike = len(set(plan.layers)) == 1
        units, heads, kv_heads = zip(
            *((layer.units, layer.heads, layer.kv_heads) for layer in plan.layers), strict=True
        )
        writer.add_feed_forward_length(units[0] if alike else list(units))
        writer.add_head_count(heads[0] if alike else list(heads))
        writer.add_head_count_kv(kv_heads[0] if alike else list(kv_heads))
        writer.add_key_length(plan.head_dim)
        writer.add_value_length(plan.head_dim)
        writer.add_rope_dimension_count(plan.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            tokenizer.write(writer)
        _write_tensors(model, plan, writer, kind)
    finally:
        writer.close()


def _write_tensors(model: PreTrainedModel, plan: GgufPlan, writer: GGUFWriter, kind: str) -> None:
    import gguf

    # Twice over: a file begins with the shapes of all, and no more than one is to be in memory.
    for stored in stored_tensors(model, plan):
        wanted = _type_of(stored.shape, kind)
        if wanted == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(stored.name, stored.shape, np.dtype(np.float32), 4 * math.prod(stored.shape))
        else:
            shape = gguf.quant_shape_to_byte_shape(stored.shape, wanted)
            writer.add_tensor_info(stored.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored in stored_tensors(model, plan):
        values = stored.read().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(values, _type_of(stored.shape, kind)))


def _type_of(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % BLOCK:
        return types.F16
    return types[kind.upper()]
