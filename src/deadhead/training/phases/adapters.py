"""LoRA while a phase trains: the weights stay, small adapters learn beside them and are merged at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from deadhead.attaching import rehang
from deadhead.errors import InputError, require_extra


@contextmanager
def lora(model: PreTrainedModel, rank: int) -> Iterator[nn.Module]:
    """Yield PEFT's wrapper of `model` with LoRA adapters on every linear layer; merge them when the block ends well.

    Gates stay trainable and see the adapters' output too.

    Args:
        model: gated or not; in place.
        rank: of the adapters, 1 or more.

    Raises:
        InputError: PEFT is not installed, or the model keeps segment memory, whose layers adapters would miss.
    """
    require_extra("peft", "peft", what="LoRA")
    import peft

    if hasattr(model.config, "memory_length"):
        raise InputError(
            "LoRA is for pretrained models of transformers; deadhead's own read their projections' weights directly, "
            "so leave the LoRA rank out."
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
