"""A cut model as a checkpoint of its stock architecture, padded with zeros, for servers that take no other.

All layers get as many heads and hidden units as the widest layer; the added ones are zeros, which add nothing. If the
stock configuration cannot express so few heads, there are as many as it can express, at most those of the dense model.

Dimensions: H query heads, G key/value heads (of one layer), E head width, F hidden units, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts import find_layout
from deadhead.layouts.stock import HEADS, KV_HEADS, UNITS, empty_model, head_widths, stock_values
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.pruned.feed_forward import FeedForward, find_feed_forwards, rows_of_units
from deadhead.models.pruned.modeling_pruned import PrunedModel, stock_class
from deadhead.models.pruned.shrinking import Heads, heads_of, rows_of
from deadhead.models.pruned.structure import Attention, Key, find_attentions


@torch.no_grad()
def pad_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the stock class that computes what `model` does, with weights of its own.

    Llama's configuration requires that the number of heads divides the width. If it does not, a Llama is written as a
    Mistral without a sliding window, which is otherwise the same.

    Raises:
        UnsupportedModel: the model is not a stock model that was cut.
    """
    if isinstance(model, AllAttentionForCausalLM):
        raise UnsupportedModel(
            "An All-attention model has no stock architecture to be padded to; export it to onnx (--to onnx)."
        )
    plan = find_layout(model).recorded_plan(model)
    if plan is None or not isinstance(model, PrunedModel):
        raise UnsupportedModel(
            "Padding is for models that deadhead has cut so that layers differ, and this one's do not: its checkpoint "
            "loads in every server as it is."
        )
    source = {attention.key: attention for attention in find_attentions(model)[0]}
    blocks = {found.key: found for found in find_feed_forwards(model)}
    # The query heads that a layer has left, by their index in the dense model.
    original = {
        key: heads_of(plan.unit, kept, *source[key].dense_heads).queries if key in source else tuple(kept)
        for key, kept in plan.kept.items()
    }
    for probe, is_dense in _candidates(model, source, blocks):
        if _fits(probe, model, source, blocks):
            made: PreTrainedModel = type(probe)._from_config(probe.config, dtype=model.dtype)
            _fill(made, model, source, blocks, original if is_dense else None)
            return made.eval()
    raise UnsupportedModel(
        f"{stock_class(type(model)).__name__} cannot be padded: no stock configuration fits its heads."
    )


def _candidates(
    model: PreTrainedModel, source: Mapping[Key, Attention], blocks: Mapping[Key, FeedForward]
) -> Iterator[tuple[PreTrainedModel, bool]]:
    """Yield stock models on the meta device, narrowest first, and whether each is as wide as the dense one."""
    stock: Any = stock_class(type(model))
    stock_config: Any = stock_class(type(model.config))
    values = stock_values(model.config)
    repeat = math.gcd(*(found.num_heads // found.num_kv_heads for found in source.values())) or 1
    widest = max((found.num_heads // repeat for found in source.values()), default=1)
    units = max((found.width for found in blocks.values()), default=0)
    dense_heads = next((values[name] for name in HEADS if name in values), 0)
    forms: list[tuple[Any, Any, dict[str, Any]]] = [(stock, stock_config, {})]
    if (
        stock is LlamaForCausalLM
        and stock_config is LlamaConfig
        and not (values.get("attention_bias") or values.get("mlp_bias"))
    ):
        forms.append((MistralForCausalLM, MistralConfig, {"sliding_window": None}))
    widths = head_widths(stock_config, list(source.values()))
    for count in range(widest, dense_heads // repeat + 1):
        changed = dict(values)
        for names, number in ((HEADS, count * repeat), (KV_HEADS, count), (UNITS, units)):
            changed |= {name: number for name in names if name in changed and number}
        for (model_class, config_class, more), width in product(forms, widths):
            for probe in _probe(model_class, config_class, {**changed, **more, **width}):
                yield probe, False
    for probe in _probe(stock, stock_config, values):
        yield probe, True


def _probe(model_class: Any, config_class: Any, fields: dict[str, Any]) -> list[PreTrainedModel]:
    """Return a model with these sizes on the meta device, or None if its configuration refuses them."""
    try:
        return [empty_model(model_class, config_class, fields)]
    except Exception:  # each class has its own way to refuse
        return []


def _fits(
    probe: PreTrainedModel, model: PreTrainedModel, source: Mapping[Key, Attention], blocks: Mapping[Key, FeedForward]
) -> bool:
    """Return whether a stock model has places for all layers' heads and hidden units, and is otherwise the same."""
    targets = {found.key: found for found in find_attentions(probe)[0]}
    wider = {found.key: found for found in find_feed_forwards(probe)}
    resized = {id(tensor) for tensor in _unit_tensors(probe)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return (
        all(
            key in targets
            and targets[key].head_dim == found.head_dim
            and targets[key].num_heads >= found.num_heads
            and [part.path for part in targets[key].parts] == [part.path for part in found.parts]
            for key, found in source.items()
        )
        and all(key in wider and wider[key].width >= found.width for key, found in blocks.items())
        and all(
            tensor.shape == shapes.get(name, tensor.shape)
            for name, tensor in probe.state_dict(keep_vars=True).items()
            if id(tensor) not in resized
        )
    )


def _unit_tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the parameters with heads or hidden units in them."""
    for attention in find_attentions(model)[0]:
        yield from (attention.module.get_parameter(part.path) for part in attention.parts)
    for block in find_feed_forwards(model):
        yield from (block.module.get_parameter(name) for name, *_ in block.tensors())


def _fill(
    made: PreTrainedModel,
    model: PreTrainedModel,
    source: Mapping[Key, Attention],
    blocks: Mapping[Key, FeedForward],
    original: Mapping[Any, Sequence[int]] | None,
) -> None:
    """Give the stock model the cut one's weights, and zeros where heads and hidden units are missing."""
    filled = {id(tensor.zero_()) for tensor in _unit_tensors(made)}
    for target in find_attentions(made)[0]:
        if (found := source.get(target.key)) is not None:
            for part in target.parts:
                _place_heads(part, target, found, None if original is None else original[target.key])
    for wide in find_feed_forwards(made):
        narrow = blocks.get(wide.key)
        if narrow is not None and narrow.width:
            for name, dim, _ in wide.tensors():
                rows = rows_of_units(wide, name, torch.arange(narrow.width))
                wide.module.get_parameter(name).index_copy_(dim, rows, narrow.module.get_parameter(name))
    given = model.state_dict(keep_vars=True)
    for name, tensor in made.state_dict(keep_vars=True).items():
        # What an emptied layer does not have any more, such as a norm that its heads shared, does nothing.
        if id(tensor) not in filled and name in given:
            tensor.copy_(given[name])


def _place_heads(part: Any, target: Attention, source: Attention, places: Sequence[int] | None) -> None:
    """Copy a part's rows from the cut module's heads to those of the stock module; without `places`, to the first."""
    places = range(source.num_heads) if places is None else places
    share, wide_share = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    heads = Heads(tuple(places), tuple(place // wide_share for place in places[::share]))
    tensor = target.module.get_parameter(part.path)
    rows = rows_of(target, part.order, tensor.shape[part.dim], heads)
    tensor.index_copy_(part.dim, rows, source.module.get_parameter(part.path))
