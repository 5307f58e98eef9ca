"""Refuse a checkpoint folder that describes an impossible model, before memory or time is spent on it.

Transformers makes whatever a configuration describes: a few kilobytes could request all the memory of a machine.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from torch.nn.modules import module as torch_module
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from deadhead.checkpoints.declared import declared_config
from deadhead.checkpoints.quantised import require_numbers
from deadhead.disk.reading import read_object, shown
from deadhead.disk.stored import INDEX_FILE, WEIGHTS_FILE, no_weights, read_header, weight_files
from deadhead.errors import InputError, first_line
from deadhead.measure.cost import skeleton

MOST_PARAMETERS = 10**13
# Weights that a model may have beyond those in the checkpoint: 256 MiB in float32. Missing ones are named later.
_MOST_NEW = 2**26
# The most parts that a number of a quantised checkpoint may be divided into.
_MOST_PACKED = 16
# Each module takes some kilobytes; the largest existing models have a tenth of this number, or less.
_MOST_MODULES = 200_000
_ADAPTER = "adapter_config.json"
# Small files that transformers reads whole.
_SMALL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def guarded_config(path: Path) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Return the configuration in a folder, or in its config.json, and the model that it describes, without weights.

    Nothing is fetched, and no code that comes with the folder runs.

    Raises:
        InputError: the configuration cannot be used, or describes an impossible model.
    """
    file = path / "config.json" if path.is_dir() else path
    values = declared_config(path)
    kind = values.get("model_type")
    # Old checkpoints have no type, and transformers guesses it from the folder's name.
    is_told = "auto_map" in values or "model_type" in values
    if is_told and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise InputError(
            f"The model configuration {file} has model type {shown(kind)} and cannot be used: neither deadhead nor "
            "transformers knows it, and deadhead never runs code that a checkpoint brings along."
        )
    # Stop making the model once it has more modules than any real one.
    modules = count(1)

    def count_one(*_: Any) -> None:
        if next(modules) > _MOST_MODULES:
            raise InputError(f"The configuration describes over {_MOST_MODULES:,} modules, but no model has as many.")

    hook = torch_module.register_module_module_registration_hook(count_one)
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        model = skeleton(config)
    except InputError:
        raise
    except Exception as error:  # each architecture has checks of its own, and its own faults where it has none
        raise InputError(
            f"The model configuration {file}, of type {shown(kind)}, cannot be used: {_reason(error)}."
        ) from error
    finally:
        hook.remove()
    if (parameters := model.num_parameters()) > MOST_PARAMETERS:
        raise InputError(
            f"The model configuration {file} describes {parameters:.1e} parameters, but no model has over "
            f"{MOST_PARAMETERS:.0e}."
        )
    return config, model


def require_sound(folder: Path) -> PreTrainedConfig:
    """Return a checkpoint folder's configuration, checked against the folder's files, without reading a weight.

    Raises:
        InputError: there is no usable configuration; the weights are missing, pickled, damaged, of another shape or far
            too few for it; or an index names files outside the folder.
        UnsupportedModel: weights are integers.
    """
    for name in _SMALL:
        if (folder / name).exists():
            read_object(folder / name, what="file")
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder} holds an adapter ({_ADAPTER}), with which transformers would load a base model from wherever it "
            "says; merge it into its model with PEFT's merge_and_unload, and save that."
        )
    config, model = guarded_config(folder)
    files = _weight_files(folder, config)
    if not files:
        raise no_weights(folder)
    if hasattr(config, "quantization_config"):
        held = sum(file.stat().st_size for file in files) * _MOST_PACKED
    else:
        stored = [tensor for file in files for tensor in read_header(file)]
        held = sum(tensor.numel for tensor in stored)
        require_numbers(model, stored, folder)
    if (parameters := model.num_parameters()) > held + _MOST_NEW:
        raise InputError(
            f"The configuration in {folder} describes {parameters:,} parameters, but its files hold {held:,}; it is "
            "another model's, or a file is missing."
        )
    return config


def misshapen(folder: Path) -> str:
    """Return a clause that names a tensor whose shape does not fit the configuration, or ""."""
    config, model = guarded_config(folder)
    stored = {tensor.name: tensor for file in _weight_files(folder, config) for tensor in read_header(file)}
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].shape != tuple(parameter.shape):
            return f"{name} has shape {list(stored[name].shape)}, but {list(parameter.shape)} was expected"
    return ""


def _weight_files(folder: Path, config: PreTrainedConfig) -> list[Path]:
    """Return the files that transformers reads weights from: a single file comes before shards."""
    named = getattr(config, "transformers_weights", None) or WEIGHTS_FILE
    if not isinstance(named, str) or set("/\\\0") & set(named) or not named.endswith((".safetensors", INDEX_FILE)):
        raise InputError(
            f"The model configuration {folder / 'config.json'} names {shown(named)} for its weights, but only "
            ".safetensors files of its own folder may be there."
        )
    if named.endswith(".safetensors") and (folder / named).is_file():
        return [folder / named]
    return weight_files(folder, folder / (named if named.endswith(".json") else INDEX_FILE))


def _reason(error: Exception) -> str:
    # The list of all types that transformers knows is not part of the reason.
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("Model type should be one of")]
    return first_line(ValueError((lines or [type(error).__name__])[-1]))
