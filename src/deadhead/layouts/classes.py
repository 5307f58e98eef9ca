"""The class of a model, as its configuration names it. Nothing but transformers and deadhead is looked in for it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deadhead import models
from deadhead.errors import UnsupportedModel
from deadhead.models.pruned import modeling_pruned
from deadhead.models.pruned.modeling_pruned import PREFIX, auto_of, is_listed, stock_class

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a configuration's `architectures` names; by default the one for a language model.

    For language models with foreign code, or of another type, it is transformers' language model of this type.

    Raises:
        UnsupportedModel: there is no such class for this type of model.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    found = _named(name) if isinstance(name, str) else None
    if found is not None and _is_for(found, config):
        return found
    if name is None or (isinstance(name, str) and name.endswith(_CAUSAL)):
        for auto in (AutoModelForCausalLM, *([AutoModel] if name is None else [])):
            table: Any = auto._model_mapping
            if type(config) in table:
                listed = table[type(config)]
                return listed[0] if isinstance(listed, (tuple, list)) else listed
    why = "gives no class" if name is None else f"names the class {str(name)[:80]!r}"
    raise UnsupportedModel(
        f"The configuration {why} in architectures, and transformers has none like that for models of type "
        f"{config.model_type!r}; deadhead runs no code of others."
    )


def _named(name: str) -> type[PreTrainedModel] | None:
    """Return a class of deadhead or of transformers by its name."""
    place = modeling_pruned if name.startswith(PREFIX) else models if hasattr(models, name) else transformers
    found = getattr(place, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _is_for(found: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    declared = found.config_class
    if isinstance(declared, type) and isinstance(config, declared):
        return True
    stock: Any = stock_class(type(config))
    return is_listed(stock_class(found).__name__, stock.model_type)


def auto_name(model: PreTrainedModel) -> str:
    """Return the Auto class of transformers that loads models like this one, or its own class if none does."""
    stock = stock_class(type(model)).__name__
    return getattr(type(model), "_auto_class", None) or auto_of(stock) or stock
