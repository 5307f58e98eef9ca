"""Find the attention modules of a Hugging Face model by their structure.

Dimensions: D model width, H query heads, G key/value heads (G divides H), E width of a head's output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Names of the projections of queries, keys and values where each has one of its own.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("Wq", "Wk", "Wv"),
    ("q", "k", "v"),
)
# Names of one projection for all three, and the order of heads in it (see `head_order`).
_FUSED = {"qkv_proj": "blocks", "Wqkv": "blocks", "c_attn": "blocks", "query_key_value": "groups", "qkv": "blocks"}
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "Wo", "o", "projection_layer", "proj")
# Multi-head latent attention: each head's queries, keys and values are expanded from compressed ones.
_LATENT_QUERY = ("q_b_proj", "q_gate_proj", "q_proj")
_LATENT_KEY_VALUE = "kv_b_proj"
# Further parameters of attention modules, by the first part of their name.
_PER_QUERY_HEAD = ("sinks", "gate_proj", "gate_bias", "g_proj", "r_proj", "sink_proj")
_SHARED = ("q_a_proj", "kv_a_proj_with_mqa", "indexer")
# Attention to something else than the text itself is left alone.
_CROSS = ("crossattention", "cross_attention", "encoder_attn", "cross_attn", "encoder_attention")

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
# Where the configuration of a cut model that is a stock one keeps the dense model's numbers, by their names there.
DENSE_SIZES = "dense_sizes"
_HEAD_WIDTHS = ("v_head_dim", "head_dim", "attention_head_size", "head_size")

Key = int | str


class UnknownStructure(Exception):
    """An attention module that cannot be cut; the message is a clause that says why."""


@dataclass(frozen=True)
class Part:
    """A parameter of an attention module, by its name there, with heads along `dim` in an order of `head_order`."""

    path: str
    dim: int
    order: str
    per_token: bool  # whether it is a projection's weight, with one multiply-add a number and token


@dataclass(frozen=True)
class Attention:
    """One attention module, as it is now: H query heads, G key/value heads, E wide."""

    key: Key  # its layer's index, or its path where a model has more than one stack of layers
    path: str  # in the model that was searched
    module: nn.Module  # holds everything, the output projection included
    inner: nn.Module  # computes attention: `module` itself, or its child `self` as in BERT
    output_path: str  # name of the output projection in `module`
    parts: tuple[Part, ...]  # every tensor with heads in it, but for the output projection's bias
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_heads: tuple[int, int]  # H and G in the dense model


def head_order(order: str, num_heads: int, num_kv_heads: int) -> list[tuple[str, int]]:
    """Return the heads whose rows lie side by side in a tensor, as pairs of "q", "k" or "v" and the head's index.

    The order is "query" or "kv" for the heads of one kind, "blocks" for all queries, then keys, then values, "groups"
    for each key/value head's queries, key and value together.
    """
    queries = [("q", head) for head in range(num_heads)]
    keys, values = ([(kind, head) for head in range(num_kv_heads)] for kind in "kv")
    if order == "query":
        return queries
    if order == "kv":
        return keys
    if order == "blocks":
        return queries + keys + values
    repeat = num_heads // num_kv_heads
    groups = [[*queries[g * repeat : (g + 1) * repeat], keys[g], values[g]] for g in range(num_kv_heads)]
    return [head for group in groups for head in group]


def find_attentions(model: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """Return the attention modules whose heads can be cut, and for each of the others its path and the reason why not.

    Emptied modules (see `shrinking`) are not among them.
    """
    found: list[tuple[str, Attention]] = []
    refused: dict[str, str] = {}
    stack = text_stack(model)
    for path, module in stack.named_modules():
        if any(part in _CROSS for part in path.split(".")):
            continue
        try:
            attention = _describe(path, module)
        except UnknownStructure as reason:
            refused[path] = str(reason)
        else:
            if attention is not None:
                found.append((path, attention))
    keys = layer_keys([path for path, _ in found] + list(emptied(model)) + list(refused))
    recorded = dense_sizes(getattr(stack, "config", None))
    return [
        replace(attention, key=keys[path], dense_heads=_dense_heads(attention, recorded)) for path, attention in found
    ], refused


def dense_sizes(config: Any) -> dict[str, int | None]:
    """Return the numbers that the dense model's configuration had where a cut model's, a stock one, has others."""
    found = getattr(config, DENSE_SIZES, None)
    sizes = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in sizes if value is None or (type(value) is int and value > 0)}


def _dense_heads(attention: Attention, recorded: Mapping[str, int | None]) -> tuple[int, int]:
    """Return H and G in the dense model: as a stock configuration records them, or as `shrink` notes in a module."""
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    noted: Any = getattr(attention.module, "dense_heads", (num_heads, num_kv_heads))
    dense = next((size for name in HEAD_COUNTS if (size := recorded.get(name))), None)
    if dense is None:
        return int(noted[0]), int(noted[1])
    # Where it has no number for the latter, there is one for each query head, or one for all.
    same = dense if num_kv_heads == num_heads else num_kv_heads
    dense_kv = next((size for name in KV_HEAD_COUNTS if (size := recorded.get(name))), same)
    return (dense, dense_kv) if dense % dense_kv == 0 else (int(noted[0]), int(noted[1]))


def emptied(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules that have lost all heads, by path."""
    modules = text_stack(model).named_modules()
    return {path: module for path, module in modules if getattr(module, "is_emptied", False)}


def layer_keys(paths: list[str]) -> dict[str, Key]:
    """Return the layer's index for each module path, or the paths themselves where an index is not enough."""
    matches = {path: re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in paths}
    places = {path: (path[: match.start()], int(match[1])) for path, match in matches.items() if match}
    is_one_stack = len({stack for stack, _ in places.values()}) == 1 and len(set(places.values())) == len(paths)
    return {path: places[path][1] if is_one_stack else path for path in paths}


def text_stack(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text: the decoder of a language model, alone or in a larger model."""
    owner: Any = model
    decoder = owner.get_decoder() if hasattr(model, "get_decoder") else None
    # Some keep their output layer under the name that others give the decoder.
    if isinstance(decoder, PreTrainedModel):
        return decoder
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _describe(path: str, module: nn.Module) -> Attention | None:
    """Return what `module` is, or None if it is no attention module; UnknownStructure if it cannot be cut."""
    inner, output_path = module, next((name for name in _OUTPUT if is_projection(module, name)), None)
    own = getattr(module, "self", None)
    if output_path is None and isinstance(own, nn.Module) and is_projection(getattr(module, "output", None), "dense"):
        inner, output_path = own, "output.dense"
    if output_path is None:
        return None
    parts = _projections(inner)
    if parts is None:
        return None
    given = inspect.signature(inner.forward).parameters
    if "position_bias" in given or ("alibi" in given and getattr(getattr(inner, "config", None), "alibi", True)):
        raise UnknownStructure("the model itself makes a position bias for every head, whatever heads are left")
    if hasattr(module, "set_attention_type"):
        raise UnknownStructure("it exchanges its attention modules while it runs")
    output = module.get_submodule(output_path)
    weights = {part.path: attrgetter(part.path)(inner) for part in parts} | {f"{output_path}.weight": weight_of(output)}
    if computed := [name for name, weight in weights.items() if not isinstance(weight, nn.Parameter)]:
        raise UnknownStructure(f"its {computed[0]} is no parameter, but computed from others, as by a weight norm")
    width = weight_of(output).shape[1 - output_dim(output)]
    num_heads, num_kv_heads = _counts(inner, parts, width)
    prefix = "self." if inner is not module else ""
    covered = {part.path.rpartition(".")[0] for part in parts} | {output_path}
    parts += _extras(inner, covered, num_heads, num_kv_heads, width // num_heads)
    for part in parts:
        if attrgetter(part.path)(inner).shape[part.dim] % len(head_order(part.order, num_heads, num_kv_heads)):
            raise UnknownStructure(f"{part.path} does not divide evenly among {num_heads} heads")
    if getattr(inner, "is_kv_shared_layer", False) or getattr(inner, "store_full_length_kv", False):
        raise UnknownStructure("its keys and values are shared between layers")
    named = [Part(prefix + part.path, part.dim, part.order, part.per_token) for part in parts]
    named.append(Part(f"{output_path}.weight", output_dim(output, heads=True), "query", True))
    counts = num_heads, num_kv_heads
    return Attention(path, path, module, inner, output_path, tuple(named), *counts, width // num_heads, counts)


def _projections(inner: nn.Module) -> list[Part] | None:
    """Return the weights and biases of the projections of queries, keys and values, or None if there are none."""
    if is_projection(inner, _LATENT_KEY_VALUE):
        query = next((name for name in _LATENT_QUERY if is_projection(inner, name)), None)
        if query is None:
            return None
        return [*_linear(inner, query, "query"), *_linear(inner, _LATENT_KEY_VALUE, "query")]
    for names in _SEPARATE:
        if all(is_projection(inner, name) for name in names):
            query, key, value = names
            return [*_linear(inner, query, "query"), *_linear(inner, key, "kv"), *_linear(inner, value, "kv")]
    for name, order in _FUSED.items():
        if is_projection(inner, name):
            # One key and value head for all queries always follows the queries (GPT-BigCode, Falcon); GPT-BigCode's
            # other form keeps each head's three together.
            multi_query = getattr(inner, "multi_query", None)
            if multi_query is not None and not getattr(inner, "new_decoder_architecture", False):
                order = "blocks" if multi_query else "groups"
            return _linear(inner, name, order)
    return None


def _counts(inner: nn.Module, parts: list[Part], width: int) -> tuple[int, int]:
    """Return H and G, from the module's own numbers, its shared configuration's, and the projections' shapes."""
    config = getattr(inner, "config", None)
    num_heads = _number(inner, HEAD_COUNTS)
    if num_heads is None:
        head_dim = _number(inner, _HEAD_WIDTHS)
        num_heads = _number(config, HEAD_COUNTS) if head_dim is None else width // head_dim
    if not num_heads or width % num_heads:
        raise UnknownStructure(f"the number of heads cannot be told from its output projection's {width} inputs")
    sizes = {part.order: attrgetter(part.path)(inner).shape[part.dim] for part in reversed(parts)}
    num_kv_heads = _number(inner, KV_HEAD_COUNTS)
    if num_kv_heads is None and (repeat := _number(inner, ("num_key_value_groups",))) is not None:
        num_kv_heads = num_heads // repeat
    if getattr(inner, "multi_query", False) and not getattr(inner, "new_decoder_architecture", False):
        num_kv_heads = 1
    if ("kv" not in sizes and "query" in sizes) or (num_kv_heads is None and sizes.get("kv") == sizes.get("query")):
        num_kv_heads = num_heads
    if num_kv_heads is None and config is not None:
        num_kv_heads = _number(config, KV_HEAD_COUNTS)
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise UnknownStructure(f"its {num_heads} query heads do not divide evenly among {num_kv_heads} key/value heads")
    return num_heads, num_kv_heads


def _extras(inner: nn.Module, covered: set[str], num_heads: int, num_kv_heads: int, head_dim: int) -> list[Part]:
    """Account for every further parameter: those with heads in them are returned, shared ones are not."""
    parts: list[Part] = []
    for path, tensor in inner.named_parameters():
        owner = path.rpartition(".")[0]
        first = path.split(".")[0]
        if any(path == name or path.startswith(f"{name}.") for name in covered) or first == "head_gate":
            continue
        if "norm" in type(inner.get_submodule(owner)).__name__.lower() or "norm" in owner.lower():
            order = _norm_order(path, tensor, num_heads, num_kv_heads, head_dim)
            if order is not None:
                parts.append(Part(path, 0, order, False))
        elif first in _PER_QUERY_HEAD and not tensor.shape[0] % num_heads:
            parts.append(Part(path, 0, "query", tensor.ndim == 2))
        elif first not in _SHARED:
            raise UnknownStructure(f"it has a parameter {path} whose part in each head is not known")
    return parts


def _norm_order(path: str, tensor: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Return which heads a norm's weights belong to, or None where all heads share them."""
    if tensor.ndim == 2 and tensor.shape[0] in (num_heads, num_kv_heads):
        is_key = path.startswith("k") and tensor.shape[0] == num_kv_heads
        return "kv" if is_key or tensor.shape[0] != num_heads else "query"
    latent = path.startswith(("q_a_", "kv_a_"))
    if not latent and tensor.numel() != head_dim and tensor.numel() in (num_heads * head_dim, num_kv_heads * head_dim):
        raise UnknownStructure(f"its norm {path} runs over all heads at once, so that none can go without the others")
    return None


def _linear(inner: nn.Module, name: str, order: str) -> list[Part]:
    module = inner.get_submodule(name)
    dim = output_dim(module)
    parts = [Part(f"{name}.weight", dim, order, True)]
    if getattr(module, "bias", None) is not None:
        parts.append(Part(f"{name}.bias", 0, order, False))
    return parts


def is_projection(module: Any, name: str) -> bool:
    """Return whether a module's child of that name is a projection: a matrix with perhaps a bias."""
    child = getattr(module, "_modules", {}).get(name)
    weight = getattr(child, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(child, nn.Embedding)


def output_dim(module: nn.Module, *, heads: bool = False) -> int:
    """Return the dimension of a projection's weight that holds its outputs, or with `heads` its inputs.

    torch's Linear keeps (outputs, inputs), transformers' Conv1D (inputs, outputs).
    """
    wrapper: Any = module
    base = wrapper.get_base_layer() if hasattr(module, "get_base_layer") else module
    transposed = type(base).__name__ == "Conv1D"
    return int(transposed != heads)


def weight_of(module: nn.Module) -> Tensor:
    """Return a projection's weight, the base layer's where PEFT wraps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (_value(owner, name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _value(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except RuntimeError:
        # A configuration whose layers differ refuses to name one number for all of them.
        return None


def config_head_names(config: Any) -> Iterator[tuple[str, bool]]:
    """Yield the names under which a configuration keeps its numbers of heads, and whether it is key/value heads'."""
    for is_kv, names in ((False, HEAD_COUNTS), (True, KV_HEAD_COUNTS)):
        for name in names:
            if isinstance(_value(config, name), int):
                yield name, is_kv


def wide_rows(units: Sequence[int], width: int) -> Tensor:
    """Return the rows of some units, by index, where each has `width` rows side by side, (units · width,)."""
    return (torch.tensor(units, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def keep_rows(module: nn.Module, path: str, dim: int, rows: Tensor) -> None:
    """Put in the place of a module's parameter some of its rows, by index along a dimension, in their order."""
    owner_path, _, name = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    old = getattr(owner, name)
    new = old.index_select(dim, rows.to(old.device))
    setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if name == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = new.shape
    elif name == "weight" and type(owner).__name__ == "Conv1D":
        owner.nx, owner.nf = new.shape


def leave_bias(module: nn.Module, path: str) -> None:
    """Put in the place of a module's output projection what is left of it without inputs."""
    output = module.get_submodule(path)
    weight = weight_of(output)
    module.set_submodule(path, OutputBias(weight, weight.shape[output_dim(output)], getattr(output, "bias", None)))


class EmptyLinear(nn.Linear):
    """A projection without inputs, or without outputs; its matrix is empty, and in no file.

    It is a Linear still, so that adapters may be put on it, as on those of other layers: they have nothing to learn.
    """

    def __init__(self, like: Tensor, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", like.new_empty(out_features, in_features), persistent=False)
        self.bias: Any = None
        # While a checkpoint loads, transformers would fill what no file has.
        self._is_hf_initialized = True


class OutputBias(EmptyLinear):
    """What is left of an output projection without inputs: its bias (D,), if it has any.

    Args:
        like: a tensor of the type, and on the device, that the empty matrix is to have.
        width: D.
        bias: of the projection.
    """

    def __init__(self, like: Tensor, width: int, bias: nn.Parameter | None) -> None:
        super().__init__(like, 0, width)
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the bias for every position of `hidden` (..., any), shape (..., D)."""
        output = hidden.new_zeros((*hidden.shape[:-1], self.out_features))
        return output if self.bias is None else output + self.bias


def matrices_of_empty(model: nn.Module) -> set[str]:
    """Return patterns of the names that a file may give to what belongs to matrices of emptied projections.

    Quantisers give every Linear codes and scales, and write them, where there is nothing to quantise too.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, EmptyLinear)]
    return {rf"(^|\.){re.escape(path)}\.(?!bias$)" for path in paths}
