"""Gates alone in a folder: values as safetensors, constants as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.files import read_json, write_bytes, write_json
from deadhead.gates import HeadGates
from deadhead.gating import attach_to, detach
from deadhead.hard_concrete import GateConfig
from deadhead.plan import layer_key

GATES_FILE = "head_gates.safetensors"
GATES_CONFIG_FILE = "head_gates.json"


def save_gates(gates: HeadGates, path: str | Path) -> None:
    """Write the gates, without the model they were trained on, into a folder of a few kilobytes.

    Args:
        gates: what `deadhead.attach` returned.
        path: the folder; other files in it stay.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(path)
    write_bytes(folder / GATES_FILE, save(gates.state_dict()))
    values = {**asdict(gates.config), "unit": gates.unit}
    if gates.block_size is not None:
        values["block_size"] = gates.block_size
    if gates.present != gates.heads:
        # Training has cut some: the output scale still counts all heads that the gates were attached to.
        values["heads"] = {str(layer): list(heads) for layer, heads in gates.heads.items()}
    write_json(folder / GATES_CONFIG_FILE, values)


def load_gates(model: PreTrainedModel, path: str | Path) -> HeadGates:
    """Attach gates that `save_gates` wrote to `model`, the one they were trained on.

    Args:
        model: without gates.
        path: the folder.

    Raises:
        InputError: the folder has no gates, they are damaged, or they are another model's.
    """
    folder = Path(path)
    if not has_gates(folder):
        raise InputError(f"Gates were expected in {folder}, but there is no {GATES_FILE}.")
    values = read_json(folder / GATES_CONFIG_FILE, what="gate configuration")
    try:
        unit = values.pop("unit", None)
        heads = values.pop("heads", None)
        block_size = values.pop("block_size", None)
        config = GateConfig(**values)
        state = load_file(folder / GATES_FILE)
    except (TypeError, AttributeError):
        raise InputError(f"The gate configuration {folder / GATES_CONFIG_FILE} has unknown keys: {values!r}.") from None
    except SafetensorError as error:
        raise InputError(f"The gates {folder / GATES_FILE} are damaged or cut short: {error}.") from error
    if heads is not None:
        heads = {layer_key(layer): tuple(indices) for layer, indices in heads.items()}
    gates = attach_to(model, config=config, unit=unit, blocks=block_size or False, heads=heads)
    try:
        gates.load_state_dict(state)
    except InputError:
        detach(model)
        raise
    return gates


def has_gates(path: str | Path) -> bool:
    """Tell whether there are saved gates in a folder."""
    return (Path(path) / GATES_FILE).exists()
