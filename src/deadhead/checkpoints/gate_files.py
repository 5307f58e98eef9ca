"""Gates in a folder: alone (values as safetensors, constants as JSON), or among a model's weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.attaching import attach, detach, is_gate
from deadhead.checkpoints.declared import GATES_FILE, has_gates
from deadhead.disk.files import write_bytes, write_json
from deadhead.disk.reading import read_object, shown
from deadhead.disk.stored import read_header
from deadhead.errors import InputError, typed, typed_but
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.plans.blocks import Blocks
from deadhead.plans.unit_plan import MOST_UNITS, Layer, indices_in, layer_key

GATES_CONFIG_FILE = "head_gates.json"
# Of any constant; the seed is the largest.
_LARGEST = 2**63


@typed
def save_gates(gates: HeadGates, path: str | Path) -> None:
    """Write gates into a folder, without the model that they were trained on. Other files in the folder stay.

    Args:
        gates: the gates.
        path: the folder; it is made if it does not exist.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(path)
    write_bytes(folder / GATES_FILE, save(gates.state_dict()))
    blocks = {"blocks": {str(layer): found for layer, found in gates.choices.blocks.items()}}
    settings = {**asdict(gates.config), "unit": gates.unit, **(blocks if gates.choices.has_blocks else {})}
    write_json(folder / GATES_CONFIG_FILE, settings)


@typed_but("model")
def load_gates(model: PreTrainedModel, path: str | Path) -> HeadGates:
    """Attach the gates that `save_gates` wrote to the model that they were trained on.

    Args:
        model: the model; changed in place.
        path: the folder.

    Returns:
        The gates.

    Raises:
        InputError: the folder has no gates, they are damaged, or they belong to another model.
    """
    folder = Path(path)
    if not has_gates(folder):
        raise InputError(f"Gates were expected in {folder}, but there is no {GATES_FILE}.")
    path = folder / GATES_CONFIG_FILE
    values = read_object(path, what="gate configuration")
    try:
        state = load_file(folder / GATES_FILE)
    except SafetensorError as error:
        raise InputError(f"The gates {folder / GATES_FILE} are damaged or cut short: {error}.") from error
    except OSError as error:
        raise InputError(f"The gates {folder / GATES_FILE} cannot be read: {error.strerror or error}.") from error
    return _put_on(model, values, state, path)


def has_gates_among_weights(path: str | Path) -> bool:
    """Return whether a folder's weights were saved with gates among them, as a Trainer does (`save` does not)."""
    return any(is_gate(tensor.name) for file in Path(path).glob("*.safetensors") for tensor in read_header(file))


def load_gates_among_weights(model: PreTrainedModel, path: str | Path) -> HeadGates:
    """Attach the gates among a folder's weights to `model`, which was loaded from there.

    Raises:
        InputError: the gates have no settings, are damaged, or belong to another model.
    """
    found: dict[str, Tensor] = {}
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if is_gate(name)}  # noqa: SIM118
    settings: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    for place in sorted({name.rpartition(".")[0] for name in found}):
        values = _settings_of(found.get(f"{place}._extra_state"), path)
        key = values.pop("key", None)
        scale: Any = values.get("lr_scale")
        blocks = {**settings.get("blocks", {}), **_by_layer(values.pop("blocks", {}), Path(path))}
        # Output scaling makes up for closed heads; hidden units have none.
        has_scale = bool(settings.get("output_scale")) | (values.get("output_scale") is True)
        settings |= {**values, "output_scale": has_scale, **({"blocks": blocks} if blocks else {})}
        if _is_number(scale, float):
            names = ("log_alpha", "log_alpha_bias", scale), ("difference", "difference", 1.0)
            state |= {f"{key}.{to}": found[f"{place}.{of}"] * by for to, of, by in names if f"{place}.{of}" in found}
    return _put_on(model, settings, state, Path(path))


def _settings_of(stored: Tensor | None, path: str | Path) -> dict[str, Any]:
    try:
        values = None if stored is None else json.loads(bytes(stored.tolist()))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(
            f"The weights in {path} have gates without their settings; load the model they were made of, attach gates "
            "as they were attached then, and take their values from the weights by load_state_dict(…, strict=False)."
        )
    return values


def _put_on(model: PreTrainedModel, values: dict[str, Any], state: dict[str, Tensor], path: Path) -> HeadGates:
    """Attach gates with the settings and the state that were read from `path`."""
    unit, blocks = values.pop("unit", None), values.pop("blocks", None)
    if unit not in (None, "head", "kv_group"):
        raise InputError(
            f"The gate configuration {path} must have a unit, head or kv_group, if any, but has {shown(unit)}."
        )
    # In older files, blocks are runs of neighbours of one size.
    size = values.pop("block_size", None)
    if not (size is None or _is_number(size, int)):
        raise InputError(f"The gate configuration {path} must have a number as block_size, but has {shown(size)}.")
    config = _checked_config(values, path)
    asked = (size or False) if blocks is None else _checked_blocks(_by_layer(blocks, path), path)
    gates = attach(model, config=config, unit=unit, blocks=asked)
    try:
        gates.load_state_dict(state)
    except InputError:
        detach(model)
        raise
    return gates


def _by_layer(blocks: Any, path: Path) -> dict[str, Any]:
    if not isinstance(blocks, dict):
        raise InputError(f"The gate configuration {path} must have blocks by layer if any, but has {shown(blocks)}.")
    return blocks


def _checked_blocks(blocks: dict[str, Any], path: Path) -> Blocks:
    """Return the units of each block, which files store as ranges."""
    found: dict[Layer, list[list[int]]] = {}
    for key, texts in blocks.items():
        what = f"The blocks of layer {key} in the gate configuration {path}"
        if not isinstance(texts, list):
            raise InputError(f"{what} must be a list of ranges, such as ['0-4', '6'], but are {shown(texts)}.")
        found[layer_key(key)] = [indices_in(text, MOST_UNITS, what) for text in texts]
    return found


def _checked_config(values: dict[str, Any], path: Path) -> GateConfig:
    known = asdict(GateConfig())
    for name, value in values.items():
        if name not in known:
            raise InputError(f"The gate configuration {path} has an unknown key {shown(name)}.")
        kind = type(known[name])
        if not (isinstance(value, bool) if kind is bool else _is_number(value, kind)):
            raise InputError(
                f"The gate configuration {path} must give {name} a value like {known[name]}, but gives {shown(value)}."
            )
    return GateConfig(**values)


def _is_number(value: Any, kind: type) -> bool:
    is_of_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return is_of_kind and abs(value) <= _LARGEST
