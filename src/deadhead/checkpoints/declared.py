"""What a checkpoint folder declares: its configuration, checked without torch, and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deadhead.disk.places import checked_path
from deadhead.disk.reading import read_object, shown
from deadhead.errors import InputError

PLAN_FILE = "head_plan.json"
GATES_FILE = "head_gates.safetensors"

MOST_LAYERS = 10_000
# The largest number of heads, experts, widths, words and positions.
_MOST = 2**32
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|\w*_?layers|num_hidden_groups|num_(layer|hidden)_repeats?|layer_types")
_COUNTS = re.compile(
    r"(num|n)_.*|.*(_size|_dim|_heads|_experts|_positions|_embeddings|_length|_rank)|n?_?(head|embd|inner|ctx)|d_\w+"
)
# Keys under which a configuration may name a kernel, which transformers would fetch and run.
_KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}


def has_gates(path: str | Path) -> bool:
    """Return whether a folder has saved gates."""
    return (checked_path(path) / GATES_FILE).exists()


def declared_config(path: Path) -> dict[str, Any]:
    """Return the JSON values of a configuration; `path` is a folder or its config.json.

    Raises:
        InputError: it is not a configuration, describes an impossible model or names foreign code, or the folder links
            to files elsewhere.
    """
    if path.is_dir():
        require_config(path)
        _require_own_files(path)
    file = path / "config.json" if path.is_dir() else path
    values = read_object(file, what="model configuration")
    if not isinstance(values.get("quantization_config"), dict | None):
        raise InputError(
            f"The model configuration {file} must have an object as quantization_config, or none, but it is "
            f"{shown(values['quantization_config'])}."
        )
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise InputError(
            f"The model configuration {file} must have a list of names as architectures, or none, but it is "
            f"{shown(named)}."
        )
    for keys, value in _values(values):
        # Each part of a model may name a kernel.
        kernel = next((key for key in keys if key in _KERNELS), None)
        if kernel is not None and isinstance(value, str) and "/" in value:
            raise InputError(
                f"The model configuration {file} wants {kernel} {shown(value)}, which is code of the Hugging Face hub; "
                f"deadhead runs none that a checkpoint names: remove {kernel}."
            )
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        name = keys[-1]
        most = MOST_LAYERS if _LAYERS.fullmatch(name) else _MOST if _COUNTS.fullmatch(name) else None
        if most is not None and not 0 <= value <= most and value != -1:
            raise InputError(
                f"The model configuration {file} gives {name} as {shown(value)}, but between 0 and {most} was expected."
            )
    return values


def require_config(folder: Path) -> None:
    """Check that a folder has a configuration; if it has models in folders instead, the InputError names them."""
    if not (folder / "config.json").is_file():
        # The last two of a Trainer's checkpoints.
        steps = sorted(
            int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()
        )
        names = ["pruned", "dense", "gated", "control", *(f"checkpoint-{step}" for step in steps[:-3:-1])]
        inner = [name for name in names if (folder / name / "config.json").is_file()]
        hint = f"; its models are in {', '.join(str(folder / name) for name in inner)}" if inner else ""
        if (folder / "adapter_config.json").is_file():
            hint = (
                ": it holds PEFT's adapters without their model; load that, put them on it with "
                "PeftModel.from_pretrained, and gates, if save_gates wrote any beside them, with load_gates"
            )
        raise InputError(
            f"A model configuration was expected at {folder / 'config.json'}, but there is no such file{hint}."
        )


def _values(value: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of a configuration, and the lengths of its lists, with the keys that lead to them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _values(inner, *keys, str(key))
    elif isinstance(value, list):
        yield keys, len(value)
        for inner in value:
            yield from _values(inner, *keys)
    else:
        yield keys, value


def _require_own_files(folder: Path) -> None:
    """Check that no link leads out of a folder, because its target would be loaded, or copied beside a cut model.

    The Hugging Face hub's cache, whose folders hold links to files beside them, counts as one folder.
    """
    places = [folder.resolve()]
    if places[0].parent.name == "snapshots":
        places.append(places[0].parent.parent / "blobs")
    for entry in folder.iterdir():
        if entry.is_symlink() and entry.exists() and not any(place in entry.resolve().parents for place in places):
            raise InputError(
                f"{entry} is a link to {entry.resolve()}, outside of its folder, and is not followed; put a copy there "
                "if you trust where it leads."
            )
