"""Checkpoints whose weights are quantised: by its configuration it is told whether one can be read here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from deadhead.disk.stored import StoredTensor
from deadhead.errors import UnsupportedModel, first_line


def require_readable(config: PreTrainedConfig, path: str | Path) -> None:
    """Check that weights which a configuration declares quantised can be read here, before one is.

    Where transformers can make plain numbers of them, the configuration tells it to.

    Raises:
        UnsupportedModel: a package is missing, or transformers does not know how they were quantised.
    """
    owner = _owner(config)
    if owner is None:
        return
    declared: Any = owner.quantization_config
    try:
        found: Any = AutoQuantizationConfig.from_dict(declared)
        AutoHfQuantizer.from_config(found, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # each quantiser has checks of its own
        raise UnsupportedModel(
            f"The model in {path} is quantised ({declared.get('quant_method', 'by transformers')}), and heads cannot "
            f"be cut out of quantised weights, nor can these be read here ({first_line(error)}); take the original "
            "that was quantised, or dequantise it with the package that quantised it, and save that."
        ) from error
    if hasattr(found, "dequantize"):
        owner.quantization_config = {**declared, "dequantize": True}


def require_numbers(model: PreTrainedModel, stored: Iterable[StoredTensor], folder: Path) -> None:
    """Check that no parameter of a model is stored as integers: those are codes, which would be taken for its values.

    Raises:
        UnsupportedModel: one is.
    """
    names = {name for name, _ in model.named_parameters()}
    for tensor in stored:
        if tensor.name in names and tensor.dtype[0] in "IU":
            raise UnsupportedModel(
                f"The model in {folder} is quantised ({tensor.name} is {tensor.dtype}), and heads cannot be cut out of "
                "quantised weights, nor does its configuration say how these became so; take the original that was "
                "quantised."
            )


def forget_dequantised(config: PreTrainedConfig) -> None:
    """Let a configuration say nothing of a quantisation that `require_readable` had undone."""
    owner = _owner(config)
    if owner is not None and owner.quantization_config.get("dequantize"):
        del owner.quantization_config


def _owner(config: PreTrainedConfig) -> Any:
    """Return what declares a quantisation, the configuration or that of the part which reads text; None if neither."""
    owners = config, config.get_text_config(decoder=True)
    return next((each for each in owners if getattr(each, "quantization_config", None) is not None), None)
