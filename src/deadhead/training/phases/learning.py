"""What learns in a phase (weights, adapters or gates alone), and how activations are kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from deadhead.attaching import is_gate, rehang
from deadhead.errors import InputError, require_extra
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe


def learner(model: PreTrainedModel, recipe: PhaseRecipe) -> AbstractContextManager[nn.Module]:
    """Return the context in which only the gates, the adapters, or the weights learn."""
    if isinstance(recipe, PruneRecipe) and recipe.freeze_weights:
        return _only_gates_learn(model)
    return lora(model, recipe.lora_rank) if recipe.lora_rank else _in_float32(model)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Hold weights in float32 while the block runs, because bfloat16 rounds small steps away."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "All weights of the model are frozen, so nothing would learn; set requires_grad of the weights to train, "
            "or train adapters with lora_rank."
        )
    precisions = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        yield model
    finally:
        for name, parameter in model.named_parameters():
            # Parameter by parameter: buffers such as rotary frequencies are in float32 for good.
            parameter.data = parameter.data.to(precisions[name])


@contextmanager
def _only_gates_learn(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Freeze everything but the gates while the block runs."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_gate(name))
        yield model
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


@contextmanager
def lora(model: PreTrainedModel, rank: int) -> Iterator[nn.Module]:
    """Yield PEFT's wrapper of `model` with LoRA adapters on every linear layer; merge them if the block succeeds.

    Gates stay trainable and also multiply the adapters' output. Models with segment memory are refused, because
    adapters would miss their layers.
    """
    require_extra("peft", "peft", what="LoRA")
    import peft

    if hasattr(model.config, "memory_length"):
        raise InputError(
            "LoRA is for pretrained models of transformers, but this is one of deadhead's own, which read the weights "
            "of their projections directly; leave the LoRA rank out."
        )
    # GPT-2's layers keep their weights transposed, and PEFT wants to be told.
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed, lora_dropout=0.0
    )
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        # PEFT asks transformers for activation checkpointing by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = peft.get_peft_model(model, config)
    rehang(model)
    try:
        yield wrapped
    except BaseException:
        cast(Any, wrapped).unload()
        raise
    else:
        cast(Any, wrapped).merge_and_unload()
    finally:
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        rehang(model)


def checkpoint_activations(model: PreTrainedModel, on: bool) -> None:
    """Switch gradient checkpointing on or off, under the name that this version of transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        settings = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**settings)
    else:
        getattr(model, f"{name}_checkpointing_disable")()
