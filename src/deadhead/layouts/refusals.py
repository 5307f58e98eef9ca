"""Refusals that do not depend on the architecture: why heads cannot be cut out of a model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deadhead.errors import InputError, UnsupportedModel
from deadhead.modes import has_hooks

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Tensors that quantised layers keep in the place of a weight.
_PACKED = ("qweight", "W_q", "weight_packed")
# PEFT's kinds that put what they learned into the cache.
_CACHED = ("PREFIX_TUNING", "CARTRIDGE")


def require_model(model: Any) -> None:
    """Raise an UnsupportedModel if `model` is not a transformers model, or is a wrapper around one."""
    if isinstance(model, PreTrainedModel):
        return
    require_no_prefix(model)
    kind = type(model).__name__
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        raise UnsupportedModel(
            f"A model of transformers was expected, but got a path or name ({str(model)[:80]!r}); load it first: "
            "model = deadhead.load(...)."
        )
    inner = model.named_modules() if isinstance(model, nn.Module) else [("model", getattr(model, "model", None))]
    path = next((path for path, module in inner if isinstance(module, PreTrainedModel)), None)
    if path is None:
        raise UnsupportedModel(f"A PreTrainedModel of transformers was expected, but got a {kind} that contains none.")
    place = f"get_submodule({path!r})" if isinstance(model, nn.Module) else path
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise UnsupportedModel(
            f"A model of transformers was expected, but got a {kind}, whose adapters a cut would not fit; merge them "
            "first: model = model.merge_and_unload()."
        )
    if kind == "FullyShardedDataParallel":
        raise UnsupportedModel(
            f"A model of transformers was expected, but got a {kind}, which shares the weights of one out among "
            "processes; attach gates before the model is wrapped, and cut in one process, from a saved copy of them."
        )
    if kind == "OptimizedModule":
        kind, place = "model wrapped by torch.compile", f"{place}, and compile it afterwards"
    raise UnsupportedModel(
        f"A model of transformers was expected, but got a {kind}, which holds one; give deadhead the model inside, "
        f"which is its {place}."
    )


def require_no_prefix(model: Any) -> None:
    """Raise an UnsupportedModel if a PEFT wrapper keeps keys and values for a model's heads."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _CACHED:
            raise UnsupportedModel(
                f"What PEFT learns here ({kind}) has keys and values for every head, which a cut model could not take "
                "in; use prompt tuning, or adapters such as LoRA, or prune the model inside, its "
                "get_submodule('base_model'), without it."
            )


def require_weights(model: PreTrainedModel, what: str, remedy: str = "load it whole, without offloading") -> None:
    """Check that a model's weights are in memory, which `what` needs; messages begin with `what`.

    Raises:
        UnsupportedModel: some weights are offloaded or were never loaded: they are on the meta device, without values.
    """
    if absent := _absent(model):
        raise UnsupportedModel(
            f"{what} needs a model with its weights, but they are not all in memory ({absent[0]} is offloaded, or was "
            f"never loaded); {remedy}."
        )


def require_plain(model: PreTrainedModel, what: str, *, may_be_empty: bool = False) -> None:
    """Check that a model's weights are in memory, and plain numbers that rows can be cut out of, as `what` needs.

    One that has none at all, as it was made on the meta device, may be let through.

    Raises:
        UnsupportedModel: they are quantised, offloaded, or a part of the model is wrapped by torch.compile.
    """
    if (found := _quantised(model)) is not None:
        raise UnsupportedModel(
            f"The model is quantised ({found}), and heads cannot be cut out of quantised weights; load it in its full "
            "precision, prune it, and quantise it then."
        )
    is_empty = len(_absent(model)) == sum(1 for _ in model.parameters()) and not has_hooks(model)
    if not (is_empty and may_be_empty):
        by_command = "or cut its folder by the command deadhead cut, which takes little memory"
        require_weights(model, what, f"load it whole, without offloading, {by_command}")
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise UnsupportedModel(
                f"The model's {path} is wrapped by torch.compile, under which a checkpoint would have other names; "
                "put its _orig_mod back, and compile after the cut, or in place: module.compile()."
            )


def require_untied(model: PreTrainedModel, *, to_cut: bool = False) -> None:
    """Check that a tensor with two places in a model has both of them in its checkpoint too.

    A model to be cut may have such tensors only at its ends: its embeddings and its output layer.

    Raises:
        UnsupportedModel: a tensor would lose one of its places.
    """
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    shared = {parameter: names for parameter, names in places.items() if len(names) > 1}
    if not shared:
        return
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    known, ends = {*declared, *declared.values()}, _ends(model)
    for parameter, names in shared.items():
        first, second, *_ = names
        # Wrappers of PEFT have given the ends other names than those that are declared.
        if parameter in ends and not declared:
            raise UnsupportedModel(
                f"{first} and {second} are one tensor, but a checkpoint would lose one of them, as the configuration "
                "does not tell of that; set its tie_word_embeddings to True, or give each a tensor of its own."
            )
        if parameter not in ends and (to_cut or not known.issuperset(names)):
            raise UnsupportedModel(
                f"{first} and {second} are one tensor, but a cut, or a checkpoint, needs layers whose tensors are "
                "their own; put a copy in the second place, by copy.deepcopy of the module there."
            )


def require_recorded(model: PreTrainedModel) -> None:
    """Check that no inner model was cut alone, because the outer configuration does not record such a cut.

    Raises:
        InputError: one was; a checkpoint of the outer model would be loaded with the heads that are gone.
    """
    configs = [model.config, *(value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig))]
    plans = [None, *(getattr(config, "head_plan", None) for config in configs)]
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "head_plan", None) not in plans:
            raise InputError(
                f"A part of the model ({path}) was cut by itself, which the model's own configuration does not say, so "
                "that its heads would come back with random weights; cut the whole model instead, "
                "deadhead.cut(model, plan), or go on with that part alone."
            )


def require_gradients(model: nn.Module, what: str) -> None:
    """Check that `what` can learn here through a model's weights; messages begin with `what`."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise InputError(f"{what} cannot learn under torch.no_grad() or torch.inference_mode(); train outside of it.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            f"{what} cannot learn in a model that was loaded under torch.inference_mode(); load it outside of that."
        )


def _absent(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def _ends(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the parameters of a model's embeddings and of its output layer."""
    ends: list[nn.Module | None] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model that reads no text
            ends.append(get())
    return {parameter for end in ends if end is not None for parameter in end.parameters()}


def _quantised(model: PreTrainedModel) -> str | None:
    """Return by what, or in which tensor, a model is quantised; None if it is not."""
    declared: Any = getattr(model.config, "quantization_config", None)
    if declared is not None or getattr(model, "hf_quantizer", None) is not None:
        method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
        return str(getattr(method, "value", method) or "by transformers")
    for path, module in model.named_modules():
        if ".quantized." in type(module).__module__ or any(hasattr(module, name) for name in _PACKED):
            return f"{path} is a {type(module).__name__}"
        weight = vars(module)["_parameters"].get("weight")
        if weight is not None and (type(weight.data) is not torch.Tensor or weight.dtype not in _PLAIN):
            return f"{path}.weight is {_kind(weight)}"
    return None


def _kind(weight: torch.Tensor) -> str:
    return str(weight.dtype) if type(weight.data) is torch.Tensor else f"a {type(weight.data).__name__}"
