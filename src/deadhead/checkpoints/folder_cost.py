"""What the model in a checkpoint folder costs, from its configuration and its tensors' names and shapes, without torch.

For each kind of model below, the tensors that a configuration makes are known. If a folder holds exactly these, in the
configuration's precision, the numbers are those of `measure.cost.model_cost`. For other folders there are none here.

Dimensions: D model width, V words, L layers, H query heads, G key/value heads, E width of a head, F hidden units of a
feed-forward layer, N persistent vectors of a head, M positions of memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deadhead.checkpoints.declared import declared_config
from deadhead.disk.places import checked_path
from deadhead.disk.stored import INDEX_FILE, WEIGHTS_FILE, read_stored
from deadhead.errors import InputError
from deadhead.measure.costs import Cost
from deadhead.plans.plan import HeadPlan, Unit

_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
_CUT, _DENSE_SIZES = "deadhead_", "dense_sizes"


class _Unfamiliar(Exception):
    """The folder is not one whose cost is known here."""


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    # What it goes with: "" for nothing, "table" for embeddings and output layer, "head", "hidden" or "head hidden".
    owner: str = ""
    # Whether each of its numbers takes part in a multiply-add for every token.
    multiplies: bool = False


@dataclass
class _Model:
    """A model by its configuration's values and the plan that it was cut by, or None.

    `units` are the numbers of heads and hidden units, by their names in `Cost`.
    """

    values: Mapping[str, Any]
    plan: HeadPlan | None
    tensors: dict[str, _Tensor] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)
    context_flops: float = 0.0
    cache_values: int = 0

    def number(self, name: str, otherwise: int | None = None, *, least: int = 1) -> int:
        value = self.values.get(name)
        value = otherwise if value is None else value
        if type(value) is not int or value < least:
            raise _Unfamiliar
        return value

    def flag(self, name: str, otherwise: bool | None = None) -> bool:
        value = self.values.get(name, otherwise)
        if type(value) is not bool:
            raise _Unfamiliar
        return value

    def add(self, name: str, *shape: int, owner: str = "", multiplies: bool = False) -> None:
        """Add a tensor, unless one of its sizes is 0."""
        if all(shape):
            self.tensors[name] = _Tensor(shape, owner, multiplies)

    def linear(self, name: str, outputs: int, inputs: int, *, owner: str, bias: bool, conv1d: bool = False) -> None:
        """Add a projection into units; its bias belongs to them too."""
        shape = (inputs, outputs) if conv1d else (outputs, inputs)
        self.add(f"{name}.weight", *shape, owner=owner, multiplies=True)
        if bias:
            self.add(f"{name}.bias", outputs, owner=owner)

    def back(self, name: str, outputs: int, inputs: int, *, owner: str, bias: bool, conv1d: bool = False) -> None:
        """Add a projection out of units; its bias stays when they go."""
        self.linear(name, outputs, inputs, owner=owner, bias=False, conv1d=conv1d)
        if bias:
            self.add(f"{name}.bias", outputs)

    def norms(self, *names: str, width: int, bias: bool) -> None:
        for name in names:
            self.add(f"{name}.weight", width)
            if bias:
                self.add(f"{name}.bias", width)

    def output(self, table: str, words: int, width: int, *, tied: bool, bias: bool = False) -> None:
        """Add embeddings and output layer."""
        self.add(table, words, width, owner="table", multiplies=tied)
        if not tied:
            self.add("lm_head.weight", words, width, owner="table", multiplies=True)
        if bias:
            self.add("lm_head.bias", words, owner="table")

    def take_heads(self, layers: int, num_heads: int, num_kv_heads: int) -> list[tuple[int, int]]:
        """Return the query and key/value heads left in each layer (see `models.pruned.shrinking.heads_of`)."""
        shares = 1 < num_kv_heads < num_heads
        unit: Unit = self.plan.unit if self.plan is not None else "kv_group" if shares else "head"
        total = dict.fromkeys(range(layers), num_heads if unit == "head" else num_kv_heads)
        plan = self.plan or HeadPlan.keep_all(total, unit=unit)
        if plan.total != total:
            raise _Unfamiliar
        self.units |= {"heads": plan.heads, "total_heads": list(total.values())}
        repeat = num_heads // num_kv_heads
        if unit == "kv_group":
            return [(count * repeat, count) for count in plan.heads]
        groups = [Counter(head // repeat for head in heads) for heads in plan.kept.values()]
        return [(sum(found.values()), sum(found.values()) // (math.gcd(*found.values()) or 1)) for found in groups]

    def take_hidden_units(self, layers: int, width: int) -> list[int]:
        """Return the number of hidden units, or persistent vectors, left in each layer."""
        if not width:
            return [0] * layers
        total = dict.fromkeys(range(layers), width)
        plan = None if self.plan is None else self.plan.hidden_units
        if plan is not None and plan.total != total:
            raise _Unfamiliar
        left = [width] * layers if plan is None else plan.counts
        self.units |= {"hidden_units": left, "total_hidden_units": list(total.values())}
        return list(left)

    def cost(self, bytes_of_number: int) -> Cost:
        def numbers(owner: str, *, multiplied: bool = False) -> int:
            found = (t for t in self.tensors.values() if owner in t.owner and t.multiplies >= multiplied)
            return sum(math.prod(tensor.shape) for tensor in found)

        return Cost(
            **self.units,
            parameters=numbers(""),
            embedding_parameters=numbers("table"),
            attention_parameters=numbers("head"),
            flops_per_token=2.0 * numbers("", multiplied=True) + self.context_flops,
            attention_flops_per_token=2.0 * numbers("head", multiplied=True) + self.context_flops,
            kv_cache_bytes=self.cache_values * bytes_of_number,
            hidden_parameters=numbers("hidden"),
        )


def _llama(model: _Model, kind: str, length: int) -> None:
    width, layers = model.number("hidden_size"), model.number("num_hidden_layers")
    num_heads = model.number("num_attention_heads")
    # Types whose defaults differ from the usual ones if their configuration does not give these numbers.
    has_usual = kind in ("llama", "granite")
    num_kv_heads = model.number("num_key_value_heads", num_heads if has_usual else None)
    if width % num_heads or num_heads % num_kv_heads:
        raise _Unfamiliar
    head_dim = model.number("head_dim", None if kind in ("qwen3", "gemma") else width // num_heads)
    # Only some layers have windows.
    layer_types = model.values.get("layer_types")
    if model.values.get("use_sliding_window") or layer_types not in (None, ["full_attention"] * layers):
        raise _Unfamiliar
    bias = kind == "qwen2" or (kind != "mistral" and model.flag("attention_bias", False))
    mlp_bias = has_usual and model.flag("mlp_bias", False)
    hidden = model.take_hidden_units(layers, model.number("intermediate_size"))
    tied = model.flag("tie_word_embeddings", kind == "gemma")
    model.output("model.embed_tokens.weight", model.number("vocab_size"), width, tied=tied)
    model.norms("model.norm", width=width, bias=False)
    for layer, (queries, kv) in enumerate(model.take_heads(layers, num_heads, num_kv_heads)):
        path = f"model.layers.{layer}"
        model.norms(f"{path}.input_layernorm", f"{path}.post_attention_layernorm", width=width, bias=False)
        for name, count in {"q": queries, "k": kv, "v": kv}.items():
            model.linear(f"{path}.self_attn.{name}_proj", count * head_dim, width, owner="head", bias=bias)
        normed = head_dim if kind == "qwen3" and queries else 0
        model.norms(f"{path}.self_attn.q_norm", f"{path}.self_attn.k_norm", width=normed, bias=False)
        o_bias = bias and kind != "qwen2"
        model.back(f"{path}.self_attn.o_proj", width, queries * head_dim, owner="head", bias=o_bias)
        for name in ("gate_proj", "up_proj"):
            model.linear(f"{path}.mlp.{name}", hidden[layer], width, owner="hidden", bias=mlp_bias)
        model.back(f"{path}.mlp.down_proj", width, hidden[layer], owner="hidden", bias=mlp_bias)
        model.context_flops += 4.0 * (length + 1) * queries * head_dim
        model.cache_values += 2 * kv * head_dim * length


def _gpt2(model: _Model, kind: str, length: int) -> None:
    width, layers, num_heads = model.number("n_embd"), model.number("n_layer"), model.number("n_head")
    # Sizes may have two names; if both are there, torch must decide which one counts.
    has_others = any(name in model.values for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    if width % num_heads or has_others or model.flag("add_cross_attention", False):
        raise _Unfamiliar
    head_dim = width // num_heads
    hidden = model.take_hidden_units(layers, model.number("n_inner", 4 * width))
    tied = model.flag("tie_word_embeddings", True)
    model.output("transformer.wte.weight", model.number("vocab_size"), width, tied=tied)
    model.add("transformer.wpe.weight", model.number("n_positions"), width)
    model.norms("transformer.ln_f", width=width, bias=True)
    for layer, (queries, _) in enumerate(model.take_heads(layers, num_heads, num_heads)):
        path, inner = f"transformer.h.{layer}", queries * head_dim
        model.norms(f"{path}.ln_1", f"{path}.ln_2", width=width, bias=True)
        model.linear(f"{path}.attn.c_attn", 3 * inner, width, owner="head", bias=True, conv1d=True)
        model.back(f"{path}.attn.c_proj", width, inner, owner="head", bias=True, conv1d=True)
        model.linear(f"{path}.mlp.c_fc", hidden[layer], width, owner="hidden", bias=True, conv1d=True)
        model.back(f"{path}.mlp.c_proj", width, hidden[layer], owner="hidden", bias=True, conv1d=True)
        model.context_flops += 4.0 * (length + 1) * inner
        model.cache_values += 2 * inner * length


def _own(model: _Model, kind: str, length: int) -> None:
    width, layers = model.number("hidden_size"), model.number("num_hidden_layers")
    num_heads, memory = model.number("num_attention_heads"), model.number("memory_length")
    dense_hidden, dense_persistent = (model.number(name, least=0) for name in ("feed_forward_size", "num_persistent"))
    position = model.values.get("position")
    is_known = position in ("learned", "sinusoidal", "rotary") and (model.plan is None or model.plan.unit == "head")
    if width % num_heads or not is_known or model.values.get("adaptive_cutoffs") is not None:
        raise _Unfamiliar
    head_dim, bias = width // num_heads, model.flag("projection_bias")
    shares, is_relative = model.flag("share_position_bias"), position != "rotary"
    left = model.take_hidden_units(layers, dense_hidden or dense_persistent)
    tied, lm_bias = model.flag("tie_word_embeddings", True), model.flag("lm_head_bias")
    model.output("model.embed_tokens.weight", model.number("vocab_size"), width, tied=tied, bias=lm_bias)
    if position == "learned":
        model.add("model.position_table", memory + 1, width)
    for name in ("content_bias", "position_bias") if is_relative and shares else ():
        model.add(f"model.{name}", num_heads, head_dim)
    model.norms("model.norm", width=width if model.flag("final_layer_norm") else 0, bias=True)
    for layer, (heads, _) in enumerate(model.take_heads(layers, num_heads, num_heads)):
        path, inner = f"model.layers.{layer}.attention", heads * head_dim
        persistent = dense_persistent if dense_hidden else left[layer]
        model.norms(f"model.layers.{layer}.norm", width=width, bias=True)
        model.back(f"{path}.o_proj", width, inner, owner="head", bias=True)
        for name in "qkv":
            model.linear(f"{path}.{name}_proj", inner, width, owner="head", bias=bias)
        if is_relative:
            model.linear(f"{path}.r_proj", inner, width, owner="head", bias=bias)
            # It is applied to the table of positions once a pass, not to tokens.
            model.add(f"{path}.r_proj.weight", inner, width, owner="head")
        for name in ("content_bias", "position_bias") if is_relative and not shares else ():
            model.add(f"{path}.{name}", heads, head_dim, owner="head")
        for name in ("persistent_k", "persistent_v"):
            model.add(f"{path}.{name}", heads, persistent, head_dim, owner="head" if dense_hidden else "head hidden")
        if dense_hidden:
            path = f"model.layers.{layer}.feed_forward"
            model.norms(f"{path}.norm", width=width, bias=True)
            model.linear(f"{path}.up_proj", left[layer], width, owner="hidden", bias=True)
            model.back(f"{path}.down_proj", width, left[layer], owner="hidden", bias=True)
        elif not heads and "hidden_units" in model.units:
            # Persistent vectors go with the last head of their layer.
            model.units["hidden_units"][layer] = 0
        positions = 2.0 * (memory + 1) if is_relative else 0.0
        model.context_flops += (4.0 * min(length + 1, memory + 1) + positions + 4.0 * persistent) * inner
        model.cache_values += 2 * inner * min(length, memory)


_KINDS: dict[str, Callable[[_Model, str, int], None]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "granite"), _llama),
    "gpt2": _gpt2,
    **dict.fromkeys(("deadhead_all_attention", "deadhead_transformer_xl"), _own),
}


def folder_cost(folder: Path, *, length: int | None = None) -> tuple[Cost, HeadPlan | None] | None:
    """Return what the model in a folder costs, and the plan that it was cut by, if any; None if torch is needed.

    `length` is the number of positions before the token; by default the model's window, or 1024.

    Raises:
        InputError: the folder's configuration describes an impossible model.
    """
    has_config = (checked_path(folder) / "config.json").is_file()
    if not has_config or (folder / WEIGHTS_FILE).is_file() == (folder / INDEX_FILE).is_file():
        return None
    values = declared_config(folder)
    try:
        return _folder_cost(folder, values, length)
    except (_Unfamiliar, InputError, TypeError):
        # If anything is wrong, torch's way reports it.
        return None


def _folder_cost(folder: Path, values: Mapping[str, Any], length: int | None) -> tuple[Cost, HeadPlan | None]:
    kind, recorded = str(values.get("model_type")), values.get("head_plan")
    is_cut = kind not in _KINDS and kind.startswith(_CUT)
    stock = kind[len(_CUT) :] if is_cut else kind
    if recorded is not None and stock in _KINDS and not is_cut and _KINDS[stock] is not _own:
        # The configuration of a stock model that was cut has the dense model's numbers beside its own.
        if not isinstance(sizes := values.get(_DENSE_SIZES), dict):
            raise _Unfamiliar
        values = {**values, **sizes}
    has_others = any(name in values for name in ("quantization_config", "transformers_weights"))
    has_others |= "dtype" in values and "torch_dtype" in values
    # There is a plan if the type says so.
    if stock not in _KINDS or has_others or (is_cut and recorded is None):
        raise _Unfamiliar
    stored = read_stored(folder).tensors
    dtype, bytes_of_number = _DTYPES.get(values.get("dtype", values.get("torch_dtype", "float32")), ("", 0))
    plan = None if recorded is None else HeadPlan.from_dict(recorded)
    if plan is not None and plan.to_dict() != recorded:
        raise _Unfamiliar
    model = _Model(values, plan)
    # Every layer has tensors, so their number limits that of the layers.
    if model.number("n_layer" if stock == "gpt2" else "num_hidden_layers") > len(stored):
        raise _Unfamiliar
    if length is None:
        length = model.number("memory_length", 1024)
    _KINDS[stock](model, stock, length)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    if found != {name: (tensor.shape, dtype) for name, tensor in model.tensors.items()}:
        raise _Unfamiliar
    return model.cost(bytes_of_number), model.plan
