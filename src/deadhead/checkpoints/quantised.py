"""Checkpoints with quantised weights: whether one can be read here, by its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from deadhead.disk.stored import StoredTensor
from deadhead.errors import UnsupportedModel, first_line


def require_readable(config: PreTrainedConfig, path: str | Path) -> None:
    """Check, before weights are read, that those which a configuration declares quantised can be read here.

    If transformers can turn them into plain numbers, the configuration is changed to request this.

    Raises:
        UnsupportedModel: a package is missing, or transformers does not know the quantisation.
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
    """Check that no parameter is stored as integers, which are codes and would be mistaken for its values.

    Raises:
        UnsupportedModel: a parameter is stored as integers.
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
    """Remove from a configuration the quantisation that `require_readable` requested to undo."""
    owner = _owner(config)
    if owner is not None and owner.quantization_config.get("dequantize"):
        del owner.quantization_config


def _owner(config: PreTrainedConfig) -> Any:
    """Return the configuration that declares a quantisation: the whole model's or the text part's, or None."""
    owners = config, config.get_text_config(decoder=True)
    return next((each for each in owners if getattr(each, "quantization_config", None) is not None), None)
