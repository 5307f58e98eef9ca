"""Gates alone in a folder: values as safetensors, constants as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from deadhead.attaching import attach, detach
from deadhead.checkpoints.declared import GATES_FILE, has_gates
from deadhead.disk.files import write_bytes, write_json
from deadhead.disk.reading import read_object, shown
from deadhead.errors import InputError, typed, typed_but
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig

GATES_CONFIG_FILE = "head_gates.json"
# Of any constant; the seed is the largest.
_LARGEST = 2**63


@typed
def save_gates(gates: HeadGates, path: str | Path) -> None:
    """Write the gates, without the model they were trained on, into a folder; other files in it stay.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(path)
    write_bytes(folder / GATES_FILE, save(gates.state_dict()))
    size = {} if gates.block_size is None else {"block_size": gates.block_size}
    write_json(folder / GATES_CONFIG_FILE, {**asdict(gates.config), "unit": gates.unit, **size})


@typed_but("model")
def load_gates(model: PreTrainedModel, path: str | Path) -> HeadGates:
    """Attach gates that `save_gates` wrote into a folder to `model`, the one they were trained on.

    Raises:
        InputError: the folder has no gates, they are damaged, or they are another model's.
    """
    folder = Path(path)
    if not has_gates(folder):
        raise InputError(f"Gates were expected in {folder}, but there is no {GATES_FILE}.")
    path = folder / GATES_CONFIG_FILE
    values = read_object(path, what="gate configuration")
    unit, block_size = values.pop("unit", None), values.pop("block_size", None)
    if unit not in (None, "head", "kv_group") or not (block_size is None or _is_number(block_size, int)):
        raise InputError(
            f"The gate configuration {path} must have a unit, head or kv_group, and a number as block_size if any, but "
            f"has {shown(unit)} and {shown(block_size)}."
        )
    config = _checked_config(values, path)
    try:
        state = load_file(folder / GATES_FILE)
    except SafetensorError as error:
        raise InputError(f"The gates {folder / GATES_FILE} are damaged or cut short: {error}.") from error
    except OSError as error:
        raise InputError(f"The gates {folder / GATES_FILE} cannot be read: {error.strerror or error}.") from error
    gates = attach(model, config=config, unit=unit, blocks=block_size or False)
    try:
        gates.load_state_dict(state)
    except InputError:
        detach(model)
        raise
    return gates


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
