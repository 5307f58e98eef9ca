"""What learns in a phase, the weights, adapters or the gates alone, and how its activations are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers import PreTrainedModel

from deadhead.attaching import is_gate
from deadhead.training.phases.adapters import lora
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe


def learner(model: PreTrainedModel, recipe: PhaseRecipe) -> AbstractContextManager[nn.Module]:
    """Return what learns while the block runs: the gates alone, adapters, or the weights."""
    if isinstance(recipe, PruneRecipe) and recipe.freeze_weights:
        return _only_gates_learn(model)
    return lora(model, recipe.lora_rank) if recipe.lora_rank else _in_float32(model)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Hold weights in float32 while the block runs: in bfloat16 a small step is rounded away."""
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


def checkpoint_activations(model: PreTrainedModel, on: bool) -> None:
    """Switch gradient checkpointing on or off, under the name that this version of transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        settings = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**settings)
    else:
        getattr(model, f"{name}_checkpointing_disable")()
