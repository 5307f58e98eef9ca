"""Remove heads from an attention module: which rows stay, which numbers change, what a module without heads does."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from .feed_forward import find_feed_forwards, shrink_feed_forward
from .structure import (
    HEAD_COUNTS,
    KV_HEAD_COUNTS,
    Attention,
    config_head_names,
    find_attentions,
    head_order,
    keep_rows,
    leave_bias,
    wide_rows,
)

_REPEATS = ("num_key_value_groups", "num_kv_groups", "n_rep")
_WIDTHS = ("embed_dim", "all_head_size", "split_size", "hidden_size", "inner_dim", "attention_dim", "d_model", "n_embd")
_KV_WIDTHS = ("kv_dim", "kv_size")


@dataclass(frozen=True)
class Heads:
    """Query heads and the key/value head of each equal share of them, by index and in order; one may serve several."""

    queries: tuple[int, ...]
    kv: tuple[int, ...]


def heads_of(unit: str, kept: Sequence[int], num_heads: int, num_kv_heads: int) -> Heads:
    """Return the heads that stay of H query and G key/value heads where `kept` units do, "kv_group" or "head".

    Transformers' attention repeats every key/value head for the same number of query heads. If single query heads go,
    groups are left with different numbers of them. Then key/value heads are stored several times, so that each serves
    as many query heads as the greatest common divisor of those numbers.
    """
    repeat = num_heads // num_kv_heads
    if unit == "kv_group":
        return Heads(tuple(group * repeat + i for group in kept for i in range(repeat)), tuple(kept))
    counts = [sum(head // repeat == group for head in kept) for group in range(num_kv_heads)]
    share = math.gcd(*counts) or 1
    return Heads(tuple(kept), tuple(group for group, count in enumerate(counts) for _ in range(count // share)))


def rows_of(attention: Attention, order: str, size: int, heads: Heads) -> Tensor:
    """Return the indices of a tensor's rows that stay, in their new order, of `size` rows now; see `head_order`."""
    now = head_order(order, attention.num_heads, attention.num_kv_heads)
    if not heads.queries:
        return torch.empty(0, dtype=torch.long)
    position = {head: place for place, head in enumerate(now)}
    later = head_order(order, len(heads.queries), len(heads.kv))
    places = [position[kind, heads.queries[index] if kind == "q" else heads.kv[index]] for kind, index in later]
    return wide_rows(places, size // len(now))


@torch.no_grad()
def shrink(attention: Attention, heads: Heads, outputs: int = 2) -> None:
    """Keep only `heads`, given by their present index, in place; none empties the module.

    An emptied one goes on returning as many `outputs`, in a tuple; 0 is one tensor, a negative number a list.
    """
    inner, module = attention.inner, attention.module
    module.dense_heads = attention.dense_heads  # type: ignore[assignment]
    if not heads.queries:
        _empty(attention, outputs)
        return
    for part in attention.parts:
        size = module.get_parameter(part.path).shape[part.dim]
        keep_rows(module, part.path, part.dim, rows_of(attention, part.order, size, heads))
    num_heads, num_kv_heads, width = len(heads.queries), len(heads.kv), attention.head_dim
    numbers = dict.fromkeys(HEAD_COUNTS, (attention.num_heads, num_heads))
    numbers |= dict.fromkeys(KV_HEAD_COUNTS, (attention.num_kv_heads, num_kv_heads))
    numbers |= dict.fromkeys(_REPEATS, (attention.num_heads // attention.num_kv_heads, num_heads // num_kv_heads))
    numbers |= dict.fromkeys(_WIDTHS, (attention.num_heads * width, num_heads * width))
    numbers |= dict.fromkeys(_KV_WIDTHS, (attention.num_kv_heads * width, num_kv_heads * width))
    for owner in {id(inner): inner, id(module): module}.values():
        for name, (before, after) in numbers.items():
            if vars(owner).get(name) == before:
                setattr(owner, name, after)
    hold_numbers(replace(attention, num_heads=num_heads, num_kv_heads=num_kv_heads))


def hold_numbers(attention: Attention) -> None:
    """Let a module have its numbers of heads, present and dense, whatever its model's configuration will say."""
    attention.module.dense_heads = attention.dense_heads  # type: ignore[assignment]
    for owner in (attention.inner, attention.module):
        if "config" in vars(owner):
            shared: Any = owner.config.shared if isinstance(owner.config, LayerConfig) else owner.config
            numbers = {False: attention.num_heads, True: attention.num_kv_heads}
            vars(owner)["config"] = LayerConfig(shared, {n: numbers[is_kv] for n, is_kv in config_head_names(shared)})


def apply_plan(model: nn.Module, plan: Mapping[str, Any], outputs: int) -> None:
    """Shrink a model as big as the dense one to what the JSON of a head plan keeps, hidden units included.

    Raises:
        ValueError: the model's attention modules or feed-forward layers are not those of the plan.
    """
    attentions = {str(attention.key): attention for attention in find_attentions(model)[0]}
    if missing := [key for key in plan["total"] if key not in attentions]:
        raise ValueError(f"the head plan in the configuration names layer {missing[0]}, which the model does not have")
    for key, kept in plan["kept"].items():
        attention = attentions[key]
        total = attention.num_heads if plan["unit"] == "head" else attention.num_kv_heads
        if plan["total"][key] != total:
            raise ValueError(
                f"the head plan in the configuration gives layer {key} {plan['total'][key]} heads, not its {total}"
            )
        if len(kept) != total:
            heads = heads_of(plan["unit"], kept, attention.num_heads, attention.num_kv_heads)
            shrink(attention, heads, outputs)
    layers = {str(feed_forward.key): feed_forward for feed_forward in find_feed_forwards(model)}
    for key, (kept, total) in hidden_units(plan).items():
        width = layers[key].width if key in layers else 0
        if total != width:
            raise ValueError(
                f"the head plan in the configuration gives layer {key} {total} hidden units, but it has {width}"
            )
        if len(kept) != total:
            shrink_feed_forward(layers[key], torch.tensor(kept, dtype=torch.long))


def hidden_units(plan: Mapping[str, Any]) -> dict[str, tuple[list[int], int]]:
    """Return by layer the hidden units that the JSON of a head plan keeps, and how many the dense model has.

    Version 3 has them as ranges, such as "0-4,6"; version 2 has blocks, runs of one size.
    """
    if blocks := plan.get("blocks"):
        size = blocks["size"]
        return {
            key: ([block * size + unit for block in kept for unit in range(size)], blocks["total"][key] * size)
            for key, kept in blocks["kept"].items()
        }
    found: dict[str, tuple[list[int], int]] = {}
    for key, text in plan.get("hidden_units", {}).get("kept", {}).items():
        kept: list[int] = []
        for part in text.split(",") if text else ():
            first, _, last = part.partition("-")
            kept += range(int(first), int(last or first) + 1)
        found[key] = kept, plan["hidden_units"]["total"][key]
    return found


class LayerConfig:
    """One layer's view of the shared configuration, with heads of its own; all else reads and writes through."""

    def __init__(self, shared: Any, own: Mapping[str, Any]) -> None:
        self.__dict__.update(shared=shared, own=dict(own))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["shared"], name, value)


class EmptyAttention(nn.Module):
    """What an attention module without heads does: nothing, but that the cache goes on counting positions.

    The module keeps its attributes and takes over a class made of this one and its own (see `_empty_class`).
    Transformers reads the length of the text so far from the cache of the first layer, so an empty layer must go on
    adding to its own, with one number a position.
    """

    # None in the part of an attention module in two, as BERT's, that leaves the projection to the other.
    output_path: str | None
    num_outputs: int
    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output projection's bias for every position, in the form of the module's dense self."""
        values = [*args, *kwargs.values()]
        hidden = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        keys = hidden.shape[-2]
        if cache is not None:
            nothing = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], self._width_in(cache)))
            keys = cache.update(nothing, nothing, self.layer_idx)[0].shape[-2]
        output = hidden[..., :0]
        if self.output_path is not None:
            output = self.get_submodule(self.output_path)(output)
        if not self.num_outputs:
            return output
        # Some return weights only where they are asked for.
        missing = max(abs(self.num_outputs), 2 if kwargs.get("output_attentions") else 1) - 1
        outputs = [output, *[None] * missing]
        if missing and self._returns_weights():
            outputs[1] = hidden.new_zeros((*hidden.shape[:-2], 0, hidden.shape[-2], keys))
        return tuple(outputs) if self.num_outputs > 0 else outputs

    def _width_in(self, cache: Cache) -> int:
        """Return how many numbers a position takes: as few as the cache allows."""
        layer: Any = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if isinstance(keys := getattr(layer, "keys", None), Tensor) and keys.ndim == 4:
            # Static caches are made before, as wide as a head.
            return keys.shape[-1]
        # Quantised caches take whole groups of numbers.
        return getattr(cache.layers[0], "q_group_size", 1) if cache.layers else 1

    def _returns_weights(self) -> bool:
        """Return whether the other layers return their attention weights, of which these have none: (B, 0, T, S).

        Transformers lists what is no None, so that without them those of the layers above would move down.
        """
        return getattr(getattr(self, "config", None), "_attn_implementation", None) in (None, "eager")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the dense module's class instead of the one made of it, which is in no file."""
        return _of_empty_class, (type(self).__mro__[2],), vars(self)


_empty_classes: dict[type, type[EmptyAttention]] = {}


def _empty_class(dense: type[nn.Module]) -> type[EmptyAttention]:
    """Return the class of a module that has lost all heads, a subclass of the dense module's.

    By that one transformers finds the modules whose attention weights it returns, one for each layer.
    """
    if dense not in _empty_classes:
        _empty_classes[dense] = type(f"Empty{dense.__name__}", (EmptyAttention, dense), {"__module__": __name__})
    return _empty_classes[dense]


def _of_empty_class(dense: type[nn.Module]) -> EmptyAttention:
    made = _empty_class(dense)
    return made.__new__(made)


def _empty(attention: Attention, outputs: int) -> None:
    module, inner = attention.module, attention.inner
    leave_bias(module, attention.output_path)
    keep = {attention.output_path.split(".")[0]} if inner is module else set()
    for table in (inner._modules, inner._parameters, inner._buffers):
        for child in [child for child in table if child not in keep]:
            del table[child]
    layer_idx: Any = getattr(inner, "layer_idx", getattr(module, "layer_idx", attention.key))
    empty = typing.cast(EmptyAttention, inner)
    empty.layer_idx = layer_idx
    empty.__class__ = _empty_class(type(inner))
    if "_old_forward" in vars(inner):
        # A hook of accelerate's goes on moving the inputs, and calls the forward that it keeps in the module itself.
        vars(inner)["_old_forward"] = empty.__class__.forward.__get__(empty)
    else:
        vars(inner).pop("forward", None)
    empty.output_path = attention.output_path if inner is module else None
    empty.num_outputs = outputs
    # While a checkpoint loads, some types would initialise parameters of theirs, which are not there.
    inner._is_hf_initialized = True  # type: ignore[assignment]
    module.is_emptied = True  # type: ignore[assignment]
