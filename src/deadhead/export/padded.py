"""A cut model as a checkpoint of its stock architecture, for servers that take no other: layers padded with zeros.

All layers get as many heads and hidden units as the widest; those that are added are zeros, which add nothing. Where
the stock configuration cannot say so few heads, there are as many as it can say, at most those of the dense model.

Dimensions: H query heads, G key/value heads (of one layer), E head width, F hidden units, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts import find_layout
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.pruned.feed_forward import FeedForward, find_feed_forwards, rows_of_units
from deadhead.models.pruned.modeling_pruned import PrunedModel, stock_class
from deadhead.models.pruned.shrinking import heads_of
from deadhead.models.pruned.structure import Attention, Key, find_attentions, head_order

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_UNITS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# What our own configurations have beside the stock ones' fields.
_OURS = ("head_plan", "attention_outputs", "auto_map", "model_type", "architectures")


@torch.no_grad()
def pad_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the stock class that computes what `model` does, with weights of its own.

    Llama's configuration wants heads that divide the width; where they do not, a Llama goes out as a Mistral without a
    sliding window, which is the same but for that.

    Raises:
        UnsupportedModel: the model is no stock model that was cut.
    """
    if isinstance(model, AllAttentionForCausalLM):
        raise UnsupportedModel(
            "An All-attention model has no stock architecture to be padded to; export it with --to onnx."
        )
    plan = find_layout(model).recorded_plan(model)
    if plan is None or not isinstance(model, PrunedModel):
        raise UnsupportedModel(
            "Padding is for models that deadhead has cut, and this one is not: its checkpoint loads in every server "
            "as it is."
        )
    source = {attention.key: attention for attention in find_attentions(model)[0]}
    blocks = {found.key: found for found in find_feed_forwards(model)}
    # The query heads that a layer has left, by their index in the dense model.
    original = {
        key: heads_of(plan.unit, kept, *source[key].dense_heads).queries if key in source else tuple(kept)
        for key, kept in plan.kept.items()
    }
    for model_class, probe, is_dense in _candidates(model, source, blocks):
        if not _fits(probe, model, source, blocks):
            continue
        made: PreTrainedModel = model_class._from_config(probe.config, dtype=model.dtype)
        _fill(made, model, source, blocks, original if is_dense else None)
        return made.eval()
    raise UnsupportedModel(
        f"{stock_class(type(model)).__name__} cannot be padded: no stock configuration fits its heads."
    )


def _candidates(
    model: PreTrainedModel, source: Mapping[Key, Attention], blocks: Mapping[Key, FeedForward]
) -> Iterator[tuple[Any, PreTrainedModel, bool]]:
    """Yield stock classes, models on the meta device, narrowest first, and whether each is as wide as the dense one."""
    stock: Any = stock_class(type(model))
    stock_config: Any = stock_class(type(model.config))
    values = {key: value for key, value in model.config.to_dict().items() if key not in _OURS}
    repeat = math.gcd(*(found.num_heads // found.num_kv_heads for found in source.values())) or 1
    widest = max((found.num_heads // repeat for found in source.values()), default=1)
    units = max((found.width for found in blocks.values()), default=0)
    dense_heads = next((values[name] for name in _HEADS if name in values), 0)
    # Some configurations take a head's width though they do not name it.
    widths: list[dict[str, Any]] = [{}, *({"head_dim": found.head_dim} for found in list(source.values())[:1])]
    for count in range(widest, dense_heads // repeat + 1):
        changed = dict(values)
        for names, number in ((_HEADS, count * repeat), (_KV_HEADS, count), (_UNITS, units)):
            changed |= {name: number for name in names if name in changed and number}
        forms: list[tuple[Any, Any, dict[str, Any]]] = [(stock, stock_config, {})]
        if stock_config is LlamaConfig and not (values.get("attention_bias") or values.get("mlp_bias")):
            forms.append((MistralForCausalLM, MistralConfig, {"sliding_window": None}))
        for model_class, config_class, more in forms:
            for width in widths:
                probe = _probe(model_class, config_class, {**changed, **more, **width})
                if probe is not None:
                    yield model_class, probe, False
    probe = _probe(stock, stock_config, values)
    if probe is not None:
        yield stock, probe, True


def _probe(model_class: Any, config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedModel | None:
    """Return a model with these sizes on the meta device, or None where its configuration does not take them."""
    try:
        with torch.device("meta"):
            made: PreTrainedModel = model_class(config_class.from_dict(fields))
    except Exception:  # each class has its own way to refuse
        return None
    return made


def _fits(
    probe: PreTrainedModel,
    model: PreTrainedModel,
    source: Mapping[Key, Attention],
    blocks: Mapping[Key, FeedForward],
) -> bool:
    """Tell whether every layer's heads and hidden units have a place in a stock model, and all else is as it was."""
    targets = {found.key: found for found in find_attentions(probe)[0]}
    wider = {found.key: found for found in find_feed_forwards(probe)}
    resized = {id(found.module.get_parameter(part.path)) for found in targets.values() for part in found.parts}
    resized |= {id(found.module.get_parameter(name)) for found in wider.values() for name, *_ in found.tensors()}
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


def _fill(
    made: PreTrainedModel,
    model: PreTrainedModel,
    source: Mapping[Key, Attention],
    blocks: Mapping[Key, FeedForward],
    original: Mapping[Any, Sequence[int]] | None,
) -> None:
    """Give the stock model the cut one's weights, and zeros where heads and hidden units are missing."""
    filled: set[int] = set()
    for target in find_attentions(made)[0]:
        for part in target.parts:
            tensor = target.module.get_parameter(part.path).zero_()
            filled.add(id(target.module.get_parameter(part.path)))
            if (found := source.get(target.key)) is not None:
                _place_heads(tensor, part, target, found, None if original is None else original[target.key])
    for wide in find_feed_forwards(made):
        narrow = blocks.get(wide.key)
        for name, dim, _ in wide.tensors():
            tensor = wide.module.get_parameter(name).zero_()
            filled.add(id(wide.module.get_parameter(name)))
            if narrow is not None and narrow.width:
                rows = rows_of_units(wide, name, torch.arange(narrow.width))
                tensor.index_copy_(dim, rows, narrow.module.get_parameter(name))
    given = model.state_dict(keep_vars=True)
    for name, tensor in made.state_dict(keep_vars=True).items():
        # What an emptied layer does not have any more, such as a norm that its heads shared, does nothing.
        if id(tensor) not in filled and name in given:
            tensor.copy_(given[name])


def _place_heads(tensor: Tensor, part: Any, target: Attention, source: Attention, places: Sequence[int] | None) -> None:
    """Copy a part's rows from the cut module's heads to those of the stock module; without `places`, to the first."""
    places = range(source.num_heads) if places is None else places
    share, wide_share = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    moved = {("q", place): ("q", head) for head, place in enumerate(places)}
    for head, place in enumerate(places):
        for kind in "kv":
            moved[kind, place // wide_share] = (kind, head // share)
    old = source.module.get_parameter(part.path)
    before = {head: row for row, head in enumerate(head_order(part.order, source.num_heads, source.num_kv_heads))}
    after = head_order(part.order, target.num_heads, target.num_kv_heads)
    each = tensor.shape[part.dim] // len(after)
    rows = [(row, before[moved[head]]) for row, head in enumerate(after) if head in moved]
    to, of = (torch.tensor(side)[:, None] * each + torch.arange(each) for side in zip(*rows, strict=True))
    tensor.index_copy_(part.dim, to.flatten(), old.index_select(part.dim, of.flatten()))
