"""Refuse a checkpoint folder that declares what cannot be, before memory or time is spent on it.

Transformers makes the model that a configuration describes, and fills what the files do not hold with new weights. So a
file of a few kilobytes could ask for all the memory there is, or for a thousand million layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from deadhead.cost import skeleton
from deadhead.errors import InputError
from deadhead.reading import read_json, read_object, shown
from deadhead.stored import INDEX_FILE, PICKLES, WEIGHTS_FILE, read_header, read_index

MOST_LAYERS = 10_000
MOST_PARAMETERS = 10**13
# Of heads, experts, widths, words and positions.
_MOST = 2**32
# New weights that a checkpoint may ask for beside those it holds: 256 MiB in float32. What is missing is named later.
_MOST_NEW = 2**26
# In how many parts a number of a quantised checkpoint may be taken apart.
_MOST_PACKED = 16
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|\w*_?layers|num_hidden_groups|num_(layer|hidden)_repeats?|layer_types")
_COUNTS = re.compile(
    r"(num|n)_.*|.*(_size|_dim|_heads|_experts|_positions|_embeddings|_length|_rank)|n?_?(head|embd|inner|ctx)|d_\w+"
)
_ADAPTER = "adapter_config.json"
# Small files that transformers reads whole.
_SMALL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def guarded_config(path: Path) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Return the configuration in a folder, or in its config.json, and the model it describes, without weights.

    Args:
        path: of either; nothing is fetched, and no code that comes with it runs.

    Raises:
        InputError: it is no configuration that can be used, or one of a model that cannot be.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "config.json" if path.is_dir() else path
    values = read_object(file, what="model configuration")
    kind = values.get("model_type")
    if "auto_map" in values and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise InputError(
            f"The checkpoint {folder} has model type {shown(kind)} and cannot be loaded: neither deadhead nor "
            "transformers knows it, and deadhead never runs code that a checkpoint brings along."
        )
    for name, value in _numbers(values):
        most = MOST_LAYERS if _LAYERS.fullmatch(name) else _MOST if _COUNTS.fullmatch(name) else None
        if most is not None and not 0 <= value <= most and value != -1:
            raise InputError(
                f"The model configuration {file} gives {name} as {shown(value)}, but between 0 and {most} was expected."
            )
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        model = skeleton(config)
    except InputError:
        raise
    except Exception as error:  # each architecture has checks of its own, and its own faults where it has none
        raise InputError(f"The configuration in {path} cannot be used: {_reason(error)}.") from error
    parameters = _parameters(model)
    if parameters > MOST_PARAMETERS:
        raise InputError(
            f"The model configuration {file} describes {parameters:.1e} parameters, but no model has over "
            f"{MOST_PARAMETERS:.0e}."
        )
    return config, model


def require_sound(folder: Path) -> None:
    """Check what a checkpoint folder declares against the files that are in it, without reading a weight.

    Raises:
        InputError: the configuration is none, the weights are pickled, damaged, of another shape or far too few for
            it, or an index names files outside the folder.
    """
    for name in _SMALL:
        if (folder / name).exists():
            read_json(folder / name, what="file")
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder} holds an adapter ({_ADAPTER}), with which transformers would load a base model from wherever it "
            "says; merge it into its model with PEFT's merge_and_unload, and save that."
        )
    config, model = guarded_config(folder)
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        for name in PICKLES:
            if (folder / name).exists():
                raise InputError(
                    f"The weights in {folder} are pickled ({name}), and reading a pickle can run any code; where you "
                    "trust them, load them with transformers and save them anew with save_pretrained."
                )
        return
    files = [folder / name for name in _weight_files(folder)]
    if hasattr(config, "quantization_config"):
        held = sum(file.stat().st_size for file in files) * _MOST_PACKED
    else:
        held = sum(tensor.numel for file in files for tensor in read_header(file))
    parameters = _parameters(model)
    if parameters > held + _MOST_NEW:
        raise InputError(
            f"The configuration in {folder} describes {parameters:,} parameters, but its files hold {held:,}; it is "
            "another model's, or a file is missing."
        )


def misshapen(folder: Path) -> str:
    """Return a clause that names a tensor whose shape is not the one that the configuration asks for, or ""."""
    _, model = guarded_config(folder)
    stored = {tensor.name: tensor for name in _weight_files(folder) for tensor in read_header(folder / name)}
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].shape != tuple(parameter.shape):
            return f"{name} has shape {list(stored[name].shape)}, but {list(parameter.shape)} was expected"
    return ""


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration and the lengths of its lists, under the name of the nearest key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, str(key))
    elif isinstance(values, list):
        yield name, len(values)
        for value in values:
            yield from _numbers(value, name)
    elif isinstance(values, int) and not isinstance(values, bool):
        yield name, values


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads: a single one is preferred to shards."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    names = sorted(set(read_index(folder / INDEX_FILE).values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                f"The index {folder / INDEX_FILE} names a file {name}, but it is not there; fetch it again."
            )
    return names


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(".:")
