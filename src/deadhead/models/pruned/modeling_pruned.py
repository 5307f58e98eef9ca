"""Transformers' models with heads cut off: a class of ours for each of theirs, made on demand.

`DeadheadLlamaForCausalLM` is a `LlamaForCausalLM` whose `__init__` removes the heads that the plan in its configuration
drops; the same holds for every model and configuration class of transformers. This file is saved with checkpoints, so
that the names in their `auto_map` are found in it, and imports only torch and transformers.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from .batching import pad_layers
from .layer_configs import PrunedConfig, building_dense
from .prefixes import keep_own_heads, mark_own
from .serving import serve
from .shrinking import apply_plan
from .structure import matrices_of_empty

PREFIX = "Deadhead"
TYPE_PREFIX = "deadhead_"
# Between the names of a model's class and of a configuration's class that is not the one it declares.
_OF = "__"
# Attribute with the patterns of names in files that no part of the model has.
_IGNORED = "_keys_to_ignore_on_load_unexpected"
# Bytes; torch allocates every tensor at a multiple of it.
_ALIGNMENT = 64
# A class that several Auto classes list is saved as that of the first.
_FIRST = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel", "AutoModelForImageTextToText")
_AUTO_NAMES: dict[str, dict[str, Any]] = {
    name: auto._model_mapping._model_mapping
    for name in dict.fromkeys((*_FIRST, *vars(modeling_auto)))
    if name.startswith("AutoModel")
    and getattr(auto := getattr(modeling_auto, name), "_model_mapping", None) is not None
}
"""Auto classes, and their tables from model type to names of classes."""

_classes: dict[str, type] = {}


class PrunedModel:
    """What our class adds to transformers'."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, then align as torch does what lies in the file's memory map at any address.

        The last bit of a product depends on it; so the model computes what the saved one did, bit for bit.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    @classmethod
    def is_custom_code(cls) -> bool:
        """Answer no: transformers' own code fills in the buffers of these models, those of custom code it skips."""
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as transformers' class does; a cache that it is given may have been made for the dense model."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if (cache := kwargs.get("past_key_values")) is not None:
            keep_own_heads(self.config, cache)  # type: ignore[attr-defined]
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        mark_own(output)
        return output

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        stock: Any = stock_class(type(self))
        text: Any = config.sub_configs.get("text_config")
        if text is not None and text is stock.config_class:
            # Auto classes give the text model of some larger ones, which is then one by itself.
            config = _text_config(config)
            self.__class__ = pruned_class(stock)  # type: ignore[assignment]
        with building_dense(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # Some classes make their base model by AutoModel, which gives one of ours, cut already.
        is_cut = any(isinstance(child, PrunedModel) for child in self.children())  # type: ignore[attr-defined]
        if config.head_plan is not None and not is_cut:
            apply_plan(self, config.head_plan, config.attention_outputs)  # type: ignore[arg-type]
            ignored = {*(getattr(self, _IGNORED) or ()), *matrices_of_empty(self)}  # type: ignore[arg-type]
            setattr(self, _IGNORED, ignored)
            serve(self, config)  # type: ignore[arg-type]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Make transformers' manager of batches, which `generate_batch` uses too, for layers that differ.

        In its cache every layer takes as much memory a token as the layer with the most key/value heads, which may be
        as much as in the dense model; the cache of `generate` takes only what each layer has.
        """
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        pad_layers(manager, self)  # type: ignore[arg-type]
        return manager


def pruned_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return our subclass of a configuration class of transformers.

    Its instances also have `head_plan`, the JSON values of a head plan (None for a dense model), and
    `attention_outputs`, how many values an attention module returns (see `shrink`).
    """
    if stock.__name__.startswith(PREFIX):
        return stock
    name = PREFIX + stock.__name__
    if name not in _classes:
        fields: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"Configuration of a `{stock.__name__.removesuffix('Config')}` model with heads cut off.",
            "__annotations__": {"head_plan": "dict | None", "attention_outputs": "int"},
            "head_plan": None,
            "attention_outputs": 2,
            "stock_type": stock.model_type,
            "model_type": TYPE_PREFIX + stock.model_type,
        }
        made: Any = type(name, (PrunedConfig, stock), fields)
        _classes[name] = made
        made.register_for_auto_class()
        _convert_alike(stock.model_type, made.model_type)
        for auto in _AUTO_NAMES:
            if (model_class := _model_class(auto, stock)) is not None:
                ours = pruned_class(model_class, stock)
                getattr(modeling_auto, auto).register(made, ours, exist_ok=True)
                # Trainer shifts labels, and pipelines accept models, by the names in these tables.
                _AUTO_NAMES[auto][made.model_type] = ours.__name__
    return _classes[name]


def pruned_class(
    stock: type[PreTrainedModel], stock_config: type[PreTrainedConfig] | None = None
) -> type[PreTrainedModel]:
    """Return our subclass of a model class of transformers, for a configuration class that it may not declare itself.

    InternLM3, for one, has a configuration of its own for Llama's classes.
    """
    if stock.__name__.startswith(PREFIX):
        return stock
    name = _class_name(stock, stock_config)
    # Making the configuration's class registers model classes for it, this one perhaps among them.
    config = pruned_config_class(stock_config or stock.config_class)  # type: ignore[arg-type]
    if name not in _classes:
        about = f"A `{stock.__name__}` with heads cut off."
        fields = {"__module__": __name__, "__doc__": about, "config_class": config}
        _classes[name] = type(name, (PrunedModel, stock), fields)
        _convert_alike(stock.__name__, name)
        if (auto := auto_of(stock.__name__)) is not None:
            _classes[name].register_for_auto_class(auto)  # type: ignore[attr-defined]
    return _classes[name]


def _convert_alike(stock: str, ours: str) -> None:
    """Let files of a type or class of ours have the names and forms of tensors that those of transformers' have.

    Some types' tensors have other names in files than in memory, or lie there one by one, as Mixtral's experts do.
    """
    if (conversions := get_checkpoint_conversion_mapping(stock)) is not None:
        register_checkpoint_conversion_mapping(ours, conversions, overwrite=True)


def is_listed(name: str, model_type: str) -> bool:
    """Return whether a class of transformers is one that an Auto class has for a type of models."""
    return any(name in _names(listed.get(model_type)) for listed in _AUTO_NAMES.values())


def auto_of(name: str) -> str | None:
    """Return the first Auto class that lists a class of transformers, or None."""
    return next(
        (auto for auto, listed in _AUTO_NAMES.items() if any(name in _names(value) for value in listed.values())), None
    )


def stock_class(found: type) -> type:
    """Return the class of transformers that a class of ours is made of; any other class itself."""
    ours = (PrunedModel, PrunedConfig)
    return next(base for base in found.__mro__ if not base.__name__.startswith(PREFIX) and base not in ours)


def auto_map(stock: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the `auto_map` of a checkpoint: for each Auto class the name of ours for a configuration class."""
    file = __name__.rpartition(".")[2]
    found = {"AutoConfig": f"{file}.{PREFIX}{stock.__name__}"}
    for auto in _AUTO_NAMES:
        if (model_class := _model_class(auto, stock)) is not None:
            found[auto] = f"{file}.{_class_name(model_class, stock)}"
    return found


def __getattr__(name: str) -> type:
    """Make `DeadheadX` for the class X of transformers."""
    stock_name, _, config_name = name.removeprefix(PREFIX).partition(_OF)
    stock = getattr(transformers, stock_name, None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return pruned_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return pruned_class(stock, getattr(transformers, config_name) if config_name else None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _model_class(auto: str, stock: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """Return the class that an Auto class of transformers has for a configuration class, or None."""
    listed = _names(_AUTO_NAMES[auto].get(stock.model_type))
    if listed:
        found: Any = getattr(transformers, listed[0], None)
        declared = getattr(found, "config_class", None)
        # A decision head is configured in files beside a dense model's weights, which a cut model has no more.
        is_beside = declared is not stock and bool(getattr(declared, "extra_config_files", None))
        return None if is_beside else found
    # Text models of larger ones (Mllama's, Emu3's) are listed under the larger model's type.
    every = {name for value in _AUTO_NAMES[auto].values() for name in _names(value)}
    try:
        modeling = importlib.import_module(stock.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    candidates = [getattr(modeling, name) for name in sorted(every) if hasattr(modeling, name)]
    return next((found for found in candidates if found.config_class is stock), None)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the text model in a cut model, cut as that is."""
    text = copy.deepcopy(config.get_text_config())
    stock = type(text)
    text.__class__ = pruned_config_class(stock)
    text.auto_map = auto_map(stock)
    text.head_plan, text.attention_outputs = config.head_plan, config.attention_outputs
    return text


def _class_name(stock: type[PreTrainedModel], stock_config: type[PreTrainedConfig] | None) -> str:
    if stock_config is None or stock_config is stock.config_class:
        return PREFIX + stock.__name__
    return f"{PREFIX}{stock.__name__}{_OF}{stock_config.__name__}"


def _names(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
