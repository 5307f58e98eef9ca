"""Write a model of the Llama family, cut or not, as a GGUF file for llama.cpp.

Which of llama.cpp's architectures can say what: where all layers are alike, the model's own; where they differ, `deci`
takes numbers of heads and hidden units for each layer, and `openelm` does so for models that norm queries and keys. A
layer without heads is one in `deci`, but for the first; elsewhere, and in place of a feed-forward layer without hidden
units, stands one of zeros, which adds nothing.

Dimensions: V vocabulary, D width, H heads, G key/value heads, E head width, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import InputError, UnsupportedModel
from deadhead.export.gguf_tokenizer import GgufTokenizer
from deadhead.models.pruned.modeling_pruned import TYPE_PREFIX, PrunedModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that are written here; what else there is, llama.cpp's own quantiser makes."""

# Model type → llama.cpp's architecture where all layers are alike.
_NATIVE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Architectures whose rotation turns neighbouring numbers, where transformers turns those half a head apart; and those
# that take factors for the frequencies.
_NEIGHBOURS, _FACTORS = ("llama", "deci"), ("llama", "deci")
# A block of Q8_0, and so the least hidden units of a layer of zeros.
_BLOCK = 32


@dataclass(frozen=True)
class LayerShape:
    """One layer in the file: H, G and F; H and G are 0 only where the architecture takes it."""

    heads: int
    kv_heads: int
    units: int


@dataclass(frozen=True)
class GgufPlan:
    """How a model goes into a file.

    Args:
        architecture: llama.cpp's name.
        layers: each one's numbers.
        head_dim: E.
        rope_factors: (E / 2,), what each frequency is divided by; None where all are 1.
    """

    architecture: str
    layers: tuple[LayerShape, ...]
    head_dim: int
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
    shapes = [_shape(layer) for layer in layers]
    head_dim = next(
        (
            q.shape[0] // shape.heads
            for layer, shape in zip(layers, shapes, strict=True)
            if (q := _query(layer)) is not None
        ),
        config.hidden_size // config.num_attention_heads,
    )
    alike = len(set(shapes)) == 1 and shapes[0].heads > 0 and shapes[0].units > 0
    norms = kind == "qwen3"
    # Llama.cpp's Qwen2 wants heads that fill the width.
    native = alike and (kind != "qwen2" or shapes[0].heads * head_dim == config.hidden_size)
    architecture = _NATIVE[kind] if native else "openelm" if norms else "deci"
    if architecture == "openelm" and not config.tie_word_embeddings:
        raise _refusal(
            kind,
            "has an output layer of its own, which llama.cpp's one architecture with norms of queries and keys and "
            "layers of different sizes does not have",
        )
    factors = _rope_factors(model, kind)
    if factors is not None and architecture not in _FACTORS:
        if norms:
            raise _refusal(kind, "scales its rotary frequencies, which that architecture of llama.cpp cannot say")
        architecture = "deci"
    written = tuple(
        _written(shape, layer, index, architecture)
        for index, (shape, layer) in enumerate(zip(shapes, layers, strict=True))
    )
    return GgufPlan(architecture, written, head_dim, factors)


def _refusal(kind: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"This {kind} model {reason}, so it cannot be written as GGUF; export it with --to onnx.")


def _query(layer: nn.Module) -> Tensor | None:
    projection = getattr(layer.self_attn, "q_proj", None)
    return None if projection is None else projection.weight


def _shape(layer: Any) -> LayerShape:
    attention, units = layer.self_attn, 0
    if isinstance(layer.mlp.down_proj, nn.Linear):
        units = layer.mlp.down_proj.in_features
    if getattr(attention, "is_emptied", False):
        return LayerShape(0, 0, units)
    kv_heads = attention.k_proj.weight.shape[0] // attention.head_dim
    return LayerShape(attention.q_proj.weight.shape[0] // attention.head_dim, kv_heads, units)


def _written(shape: LayerShape, layer: Any, index: int, architecture: str) -> LayerShape:
    """Return the numbers in the file, where some layers that do nothing must be there as zeros."""
    heads, kv_heads = shape.heads, shape.kv_heads
    has_bias = not heads and layer.self_attn.o_proj.bias is not None
    if not heads and (architecture != "deci" or index == 0 or has_bias):
        heads = kv_heads = 1
    return LayerShape(heads, kv_heads, shape.units or _BLOCK)


def _rope_factors(model: PreTrainedModel, kind: str) -> Tensor | None:
    """Return what the plain frequencies are divided by, from those that the model has."""
    rotary: Any = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    parameters = model.config.rope_parameters
    if (
        parameters["rope_type"] not in ("default", "linear", "llama3")
        or parameters.get("partial_rotary_factor", 1) != 1
    ):
        raise _refusal(kind, f"has rotary positions of type {parameters['rope_type']}, which are not written")
    found = rotary.inv_freq.float().cpu()
    plain = parameters["rope_theta"] ** -(torch.arange(len(found), dtype=torch.float32) / len(found))
    factors = plain / found
    return None if bool(((factors - 1).abs() < 1e-5).all()) else factors


def write_gguf(
    model: PreTrainedModel, path: Path, plan: GgufPlan, *, kind: str, name: str, tokenizer: GgufTokenizer | None = None
) -> None:
    """Write the file, one tensor after the other.

    Args:
        model: the model that `plan` was made of.
        path: of the file.
        plan: of `plan_file`.
        kind: one of `TYPES`.
        name: a title for people.
        tokenizer: of `read_tokenizer`; None: the file has none.
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


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _write_tensors(model: PreTrainedModel, plan: GgufPlan, writer: GGUFWriter, kind: str) -> None:
    import gguf

    # Twice over: a file begins with the shapes of all, and no more than one is to be in memory.
    for name, shape, _ in _tensors(model, plan):
        wanted = _type_of(shape, kind)
        stored = gguf.quant_shape_to_byte_shape(shape, wanted)
        count = int(np.prod(stored))
        if wanted == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), count, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, read in _tensors(model, plan):
        values = read().detach().float().cpu().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(values, _type_of(shape, kind)))


def _type_of(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return types.F16
    return types[kind.upper()]


_Entry = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def _tensors(model: PreTrainedModel, plan: GgufPlan) -> Iterator[_Entry]:
    """Yield name, shape and values of every tensor in the file."""
    decoder: Any = model.get_decoder()
    config: Any = model.config

    def entry(name: str, tensor: Tensor, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> _Entry:
        return name, tuple(tensor.shape), lambda: change(tensor)

    yield entry("token_embd.weight", decoder.embed_tokens.weight)
    yield entry("output_norm.weight", decoder.norm.weight)
    if not config.tie_word_embeddings:
        yield entry("output.weight", model.get_output_embeddings().weight)
    if plan.rope_factors is not None:
        yield entry("rope_freqs.weight", plan.rope_factors)
    for index, (layer, shape) in enumerate(zip(decoder.layers, plan.layers, strict=True)):
        block = f"blk.{index}"
        if shape.heads:
            yield entry(f"{block}.attn_norm.weight", layer.input_layernorm.weight)
            yield from _attention(block, layer.self_attn, shape, plan, config)
        yield entry(f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        yield from _feed_forward(block, layer.mlp, shape, config)


def _attention(block: str, attention: Any, shape: LayerShape, plan: GgufPlan, config: Any) -> Iterator[_Entry]:
    width, head_dim = config.hidden_size, plan.head_dim
    is_empty = getattr(attention, "is_emptied", False)
    turned = plan.architecture in _NEIGHBOURS

    def projection(letter: str, heads: int, part: str) -> Tensor | None:
        if is_empty:
            return torch.zeros(heads * head_dim, width) if part == "weight" else None
        tensor: Tensor | None = getattr(getattr(attention, f"{letter}_proj"), part)
        return tensor

    def order(heads: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: interleave_halves(tensor, heads)

    def same(tensor: Tensor) -> Tensor:
        return tensor

    numbers = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    for part in ("weight", "bias"):
        found = {letter: projection(letter, heads, part) for letter, heads in numbers.items()}
        tensors = {letter: tensor for letter, tensor in found.items() if tensor is not None}
        if not tensors:
            continue
        if plan.architecture == "openelm":
            rows = sum(tensor.shape[0] for tensor in tensors.values())
            yield f"{block}.attn_qkv.{part}", (rows, *tensors["q"].shape[1:]), _joined(list(tensors.values()))
            continue
        for letter, tensor in tensors.items():
            change = order(numbers[letter]) if turned and letter in "qk" else same
            yield f"{block}.attn_{letter}.{part}", tuple(tensor.shape), _changed(tensor, change)
    output = torch.zeros(width, shape.heads * head_dim) if is_empty else attention.o_proj.weight
    yield f"{block}.attn_output.weight", tuple(output.shape), _changed(output, same)
    if attention.o_proj.bias is not None:
        bias = attention.o_proj.bias
        yield f"{block}.attn_output.bias", tuple(bias.shape), _changed(bias, same)
    if config.model_type.removeprefix(TYPE_PREFIX) == "qwen3":
        for letter in "qk":
            norm = torch.ones(head_dim) if is_empty else getattr(attention, f"{letter}_norm").weight
            yield f"{block}.attn_{letter}_norm.weight", tuple(norm.shape), _changed(norm, same)


def _feed_forward(block: str, mlp: Any, shape: LayerShape, config: Any) -> Iterator[_Entry]:
    is_empty = not isinstance(mlp.down_proj, nn.Linear)
    shapes = {"gate": (shape.units, config.hidden_size), "up": (shape.units, config.hidden_size)}
    shapes["down"] = (config.hidden_size, shape.units)
    for part, size in shapes.items():
        module = getattr(mlp, f"{part}_proj")
        weight = torch.zeros(size) if is_empty else module.weight
        yield f"{block}.ffn_{part}.weight", size, _changed(weight, lambda tensor: tensor)
        bias = getattr(module, "bias", None)
        if bias is not None:
            yield f"{block}.ffn_{part}.bias", tuple(bias.shape), _changed(bias, lambda tensor: tensor)


def _changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: change(tensor)


def _joined(tensors: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat(tensors)


def interleave_halves(tensor: Tensor, heads: int) -> Tensor:
    """Put rows that are rotated together side by side: i and i + E/2 of each head become 2i and 2i + 1.

    Args:
        tensor: (H · E, …), weight or bias of the queries' or keys' projection.
        heads: H, or G.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def require_gguf() -> None:
    """Check that the library is there.

    Raises:
        InputError: it is not.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(
            "GGUF files are written by the library gguf; install it: pip install 'deadhead[gguf]'."
        ) from None
