"""Which hidden units of feed-forward layers, or persistent vectors, stay, and how files write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deadhead.disk.reading import shown
from deadhead.errors import InputError

Layer = int | str
"""A layer's index, or its module path where a model has more than one stack of layers."""

_KEYS = {"total", "kept"}
# No model has more heads, or hidden units, in a layer.
_MOST_HEADS, MOST_UNITS = 100_000, 1_000_000
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def layer_key(key: Layer) -> Layer:
    """Return a layer's key in memory; JSON writes indices as strings."""
    return int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def checked_total(values: Mapping[Layer, Any], unit: str) -> dict[Layer, int]:
    """Return the number of units by layer, each at least 1; InputError if something is wrong."""
    total = _by_layer(values, "totals" if unit != "hidden unit" else "totals of hidden units")
    if not total:
        raise InputError("A head plan's totals must name at least one layer, but they are empty.")
    for layer, count in total.items():
        if not is_count(count) or count == 0:
            raise InputError(
                f"A head plan must give layer {layer} at least one {unit} in all, but gives {shown(count)}."
            )
        if count > (most := MOST_UNITS if unit == "hidden unit" else _MOST_HEADS):
            raise InputError(f"A head plan gives layer {layer} {shown(count)} {unit}s, but no model has over {most}.")
    return total


def checked_kept(values: Mapping[Layer, Any], total: Mapping[Layer, int], unit: str) -> dict[Layer, tuple[int, ...]]:
    """Return the units that stay, ascending, of every layer in `total`; InputError if something is wrong."""
    kept = {layer: tuple(range(count)) for layer, count in total.items()}
    for layer, indices in _by_layer(values, f"kept {unit}s").items():
        if layer not in total:
            names = shown(list(total))
            raise InputError(f"The head plan names layer {shown(layer)}, but its totals have only: {names[1:-1]}.")
        if isinstance(indices, (str, bytes, Mapping)) or not isinstance(indices, Iterable):
            raise InputError(f"The {unit}s kept in layer {layer} must be a list of numbers, but are {shown(indices)}.")
        indices = list(indices)
        for index in indices:
            if not is_count(index) or index >= total[layer]:
                raise InputError(
                    f"The head plan keeps {unit} {shown(index)} of layer {layer}, but its {unit}s are numbered 0 to "
                    f"{total[layer] - 1}."
                )
        if len(set(indices)) != len(indices):
            raise InputError(f"The head plan names a {unit} of layer {layer} twice: {shown(indices)}.")
        kept[layer] = tuple(sorted(indices))
    return kept


def _by_layer(values: Mapping[Layer, Any], what: str) -> dict[Layer, Any]:
    if not isinstance(values, Mapping):
        raise InputError(f"A head plan's {what} must be a mapping by layer, but are {shown(values)}.")
    found: dict[Layer, Any] = {}
    for key, value in values.items():
        layer = layer_key(key)
        if layer in found:
            raise InputError(f"A head plan's {what} name layer {layer} twice.")
        found[layer] = value
    return found


def ranges_text(indices: Iterable[int]) -> str:
    """Return indices as text, in their order, with runs of neighbours as ranges: `0-4,6,9-120`; "" for none."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def indices_in(text: Any, total: int, what: str) -> list[int]:
    """Read what `ranges_text` wrote, for `total` units; an InputError says what is wrong and calls the text `what`."""
    found: list[int] = []
    for part in text.split(",") if text and isinstance(text, str) else ():
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise InputError(f"{what} must be ranges, such as '0-4,6', but have {shown(part)}.")
        if last >= total:
            raise InputError(f"{what} go up to {last}, but there are {total}, counted from 0.")
        found += range(first, last + 1)
        if len(found) > total:
            raise InputError(f"{what} are {total} at most, but some are named twice.")
    if not isinstance(text, str):
        raise InputError(f"{what} must be ranges, such as '0-4,6', but are {shown(text)}.")
    return found


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """Which hidden units, or persistent vectors, of each layer stay, by their indices in the original dense model.

    Args:
        kept: the units that stay, by layer. A layer that is not named keeps all of its units.
        total: the number of units of each layer in the dense model.

    Raises:
        InputError: the plan names a layer or a unit that the totals don't have, or names a unit twice.
    """

    kept: Mapping[Any, Sequence[int]]
    total: Mapping[Any, int]

    def __post_init__(self) -> None:
        total = checked_total(self.total, "hidden unit")
        object.__setattr__(self, "kept", checked_kept(self.kept, total, "hidden unit"))
        object.__setattr__(self, "total", total)

    def __hash__(self) -> int:
        return hash((tuple(self.kept.items()), tuple(self.total.items())))

    @classmethod
    def of_blocks(cls, *, size: int, kept: Mapping[Any, Sequence[int]], total: Mapping[Any, int]) -> UnitPlan:
        """Return the plan that keeps some blocks, each a run of `size` neighbouring units.

        Args:
            size: the units of a block.
            kept: the blocks that stay, by layer. A layer that is not named keeps all of its blocks.
            total: the number of blocks of each layer in the dense model.

        Raises:
            InputError: as for the class, or `size` is not above 0.
        """
        if not is_count(size) or size == 0:
            raise InputError(f"A head plan's block size must be a number above 0, but it is {shown(size)}.")
        blocks = checked_total(total, "block")
        # Check the totals before making lists of that length.
        totals = checked_total({layer: count * size for layer, count in blocks.items()}, "hidden unit")
        units = {
            layer: [block * size + unit for block in indices for unit in range(size)]
            for layer, indices in checked_kept(kept, blocks, "block").items()
        }
        return cls(kept=units, total=totals)

    @property
    def counts(self) -> list[int]:
        """The number of units that stay, for each layer that has any."""
        return [len(units) for units in self.kept.values()]

    @property
    def sparsity(self) -> float:
        """The share of the dense model's units that the plan drops, in [0, 1]."""
        return 1.0 - sum(self.counts) / sum(self.total.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, with the units that stay as ranges."""
        return {
            "total": {str(layer): count for layer, count in self.total.items()},
            "kept": {str(layer): ranges_text(units) for layer, units in self.kept.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> UnitPlan:
        """Read a plan from JSON values.

        Raises:
            InputError: the values are not a plan of hidden units.
        """
        if not isinstance(values, dict) or set(values) != _KEYS:
            raise InputError('A head plan\'s "hidden_units" must be a JSON object with "total" and "kept".')
        if not isinstance(values["total"], dict) or not isinstance(values["kept"], dict):
            raise InputError('"total" and "kept" of a head plan\'s "hidden_units" must be JSON objects by layer.')
        total = checked_total(values["total"], "hidden unit")
        kept = {
            key: indices_in(
                text, total.get(layer_key(key), MOST_UNITS), f"The hidden units that the head plan keeps in layer {key}"
            )
            for key, text in values["kept"].items()
        }
        return cls(kept=kept, total=total)
