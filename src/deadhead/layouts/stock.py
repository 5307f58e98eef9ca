"""What a configuration of transformers can say of a cut model: numbers, the same for all layers.

Dimensions: H query heads, G key/value heads, E head width, F hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deadhead.errors import first_line
from deadhead.layouts.base import BLOCK_GATE, HEAD_GATE
from deadhead.models.pruned.feed_forward import find_feed_forwards
from deadhead.models.pruned.modeling_pruned import (
    PrunedModel,
    auto_map,
    pruned_class,
    pruned_config_class,
    stock_class,
)
from deadhead.models.pruned.shrinking import LayerConfig
from deadhead.models.pruned.structure import DENSE_SIZES, Attention, dense_sizes, emptied, find_attentions, text_stack
from deadhead.plans.plan import HeadPlan

# Names under which configurations keep H, G and F.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
UNITS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")
_SIZES = {*HEADS, *KV_HEADS, *UNITS}
# What the configuration of a cut model has beside the stock one's fields.
_OURS = ("head_plan", "attention_outputs", "auto_map", "model_type", "architectures", DENSE_SIZES)


class NotStock(Exception):
    """No configuration of transformers describes the cut model; the message is a clause that says why."""


def stock_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the JSON values of a configuration that are the stock one's."""
    return {key: value for key, value in config.to_dict().items() if key not in _OURS}


def empty_model(model_class: Any, config_class: Any, values: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with these values on the meta device; each class has its own way to refuse them."""
    with torch.device("meta"):
        made: PreTrainedModel = model_class(config_class.from_dict(dict(values)))
    return made


def head_widths(config_class: type[PreTrainedConfig], found: Sequence[Attention]) -> list[dict[str, Any]]:
    """Return what may be added to a configuration: some take a head's width though they do not name it."""
    # Others work it out.
    is_settable = not isinstance(getattr(config_class, "head_dim", None), property)
    return [{}, *({"head_dim": attention.head_dim} for attention in found[:1] if is_settable)]


def take_stock_class(model: PreTrainedModel, sizes: Mapping[str, int]) -> None:
    """Give model and configuration transformers' classes, in place, and the sizes of `stock_sizes` to the latter.

    What the sizes were in the dense model is recorded: a later cut may leave layers that differ.
    """
    for text in _text_configs(model):
        dense = {name: getattr(text, name) for name in sizes if name in _SIZES}
        setattr(text, DENSE_SIZES, dense | dense_sizes(text))
        for name, value in sizes.items():
            setattr(text, name, value)
        # For the text model of a larger one, which can be loaded by itself.
        text.head_plan = model.config.head_plan
    for name in ("auto_map", "attention_outputs"):
        vars(model.config).pop(name, None)
    model.config.__class__ = stock_class(type(model.config))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = stock_class(type(module))
        if isinstance(view := vars(module).get("config"), LayerConfig):
            vars(module)["config"] = view.shared


def take_own_class(model: PreTrainedModel) -> None:
    """Give model and configuration our classes, in place, and the latter the dense model's sizes."""
    for text in _text_configs(model):
        for name, value in dense_sizes(text).items():
            if name in _SIZES:
                setattr(text, name, value)
        vars(text).pop(DENSE_SIZES, None)
        if text is not model.config:
            vars(text).pop("head_plan", None)
    config = model.config
    stock_model, stock_config = stock_class(type(model)), stock_class(type(config))
    config.auto_map = auto_map(stock_config)
    config.__class__ = pruned_config_class(stock_config)
    config.attention_outputs = next((m.num_outputs for m in model.modules() if hasattr(m, "num_outputs")), 2)
    model.__class__ = pruned_class(stock_model, stock_config)


def why_not_stock(model: PreTrainedModel) -> str | None:
    """Return a clause that says why a cut model has one of our classes; None if it has none, or needs none."""
    if not isinstance(model, PrunedModel) or model.config.head_plan is None:
        return None
    try:
        stock_sizes(model, HeadPlan.from_dict(model.config.head_plan))
    except NotStock as reason:
        return str(reason)
    return None


def stock_sizes(model: PreTrainedModel, plan: HeadPlan) -> dict[str, int]:
    """Return the values that the stock configuration of a model's text stack needs to describe its present layers.

    A stock model of these sizes has the same modules with the same numbers and tensors of the same shapes.

    Args:
        model: cut by `plan`, of whatever class.
        plan: which names hidden units too, if such were cut.

    Raises:
        NotStock: its layers differ, one is emptied, or the stock configuration makes no such model.
    """
    attentions, feed_forwards = find_attentions(model)[0], find_feed_forwards(model)
    if emptied(model):
        raise NotStock("a layer has no heads left")
    if len({(found.num_heads, found.num_kv_heads) for found in attentions}) != 1:
        raise NotStock("its layers have different numbers of heads")
    first = attentions[0]
    said = f"{first.num_heads} heads, each {first.head_dim} wide"
    numbers = [(HEADS, first.dense_heads[0], first.num_heads), (KV_HEADS, first.dense_heads[1], first.num_kv_heads)]
    hidden = plan.hidden_units
    if hidden is not None and hidden.counts != list(hidden.total.values()):
        if not all(found.width for found in feed_forwards):
            raise NotStock("a layer has no hidden units left")
        if len({found.width for found in feed_forwards}) != 1:
            raise NotStock("its layers have different numbers of hidden units")
        numbers.append((UNITS, next(iter(hidden.total.values())), feed_forwards[0].width))
        said += f", and {feed_forwards[0].width} hidden units"
    values, text = stock_values(model.config), model.config.get_text_config()
    place = next((name for name, value in vars(model.config).items() if value is text), None)
    own = values if place is None else values[place]
    own.pop(DENSE_SIZES, None)
    before = own | dense_sizes(text)
    sizes = {
        name: now
        for names, dense, now in numbers
        for name in names
        # A configuration may leave a number out that follows from others: as many key/value as query heads, say.
        if name in before and before[name] in (dense, None)
    }
    modules = [
        *(each for found in attentions for each in {found.module, found.inner}),
        *(f.module for f in feed_forwards),
    ]
    paths = {id(module): path for path, module in model.named_modules()}
    stock, stock_config, refusal = stock_class(type(model)), stock_class(type(model.config)), ""
    for width in head_widths(stock_config, attentions):
        own |= sizes | width
        try:
            made = empty_model(stock, stock_config, values)
        except Exception as error:
            refusal = refusal or f" ({first_line(error.__cause__ or error)})"
            continue
        if _shapes(made) == _shapes(model) and all(
            _has_numbers(module, made.get_submodule(paths[id(module)])) for module in modules
        ):
            return sizes | width
    raise NotStock(f"{stock_config.__name__} cannot say that every layer has {said}{refusal}")


def _text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configuration of the text stack: the model's part of it, and the stack's own, mostly the same."""
    found: tuple[Any, ...] = (model.config.get_text_config(), text_stack(model).config)
    return list({id(config): config for config in found}.values())


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: value.shape for name, value in tensors if not {HEAD_GATE, BLOCK_GATE} & set(name.split("."))}


def _has_numbers(module: nn.Module, stock: nn.Module) -> bool:
    """Return whether a module has every number that a stock one has: of heads, of repeats, of its scaling."""
    numbers = {name: value for name, value in vars(stock).items() if type(value) in (int, float)}
    return all(vars(module).get(name) == value for name, value in numbers.items())
