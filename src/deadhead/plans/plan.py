"""The head plan: which heads of each layer stay. The one noun that learned gates, heuristics and people share.

A plan may also say which blocks stay: runs of hidden units of a layer's feed-forward part, or of persistent vectors.
Heads and blocks together are units, which a `UnitKey` names by kind and layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json, shown
from deadhead.errors import InputError, require_type, typed

Layer = int | str
"""A layer's index, or its module path where a model has more than one stack of layers."""

Unit = Literal["head", "kv_group"]

# Version 2 adds "blocks".
_VERSIONS = (1, 2)
_KEYS = {"version", "unit", "total", "kept", "output_scale", "blocks"}
_BLOCK_KEYS = {"size", "total", "kept"}
_MOST_HEADS = 100_000
_LARGEST_BLOCK = 128
# So that a layer's width can be chosen in steps of an eighth at most.
_FEWEST_BLOCKS = 8
_BLOCKS = "blocks."


def layer_key(key: Layer) -> Layer:
    """Return a layer's key as it is in memory: JSON writes indices as strings."""
    return int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key


class UnitKey(NamedTuple):
    """The key of a layer's heads, or of its blocks, among all units of a model. `str` gives it as files have it."""

    kind: Literal["head", "block"]
    layer: Layer

    @classmethod
    def parse(cls, text: str) -> UnitKey:
        """Read a key as files have it: ``3`` of heads, ``blocks.3`` of blocks."""
        return cls("block" if text.startswith(_BLOCKS) else "head", layer_key(text.removeprefix(_BLOCKS)))

    def __str__(self) -> str:
        return f"{_BLOCKS if self.kind == 'block' else ''}{self.layer}"


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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_total(values: Mapping[Layer, Any], unit: str) -> dict[Layer, int]:
    total = _by_layer(values, "totals of blocks" if unit == "block" else "totals")
    if not total:
        raise InputError("A head plan's totals must name at least one layer, but they are empty.")
    for layer, count in total.items():
        if not _is_count(count) or count == 0:
            raise InputError(
                f"A head plan must give layer {layer} at least one {unit} in all, but gives {shown(count)}."
            )
        if count > _MOST_HEADS:
            raise InputError(
                f"A head plan gives layer {layer} {shown(count)} {unit}s, but no model has over {_MOST_HEADS}."
            )
    return total


def _checked_kept(values: Mapping[Layer, Any], total: Mapping[Layer, int], unit: str) -> dict[Layer, tuple[int, ...]]:
    kept = {layer: tuple(range(count)) for layer, count in total.items()}
    for layer, indices in _by_layer(values, f"kept {unit}s").items():
        if layer not in total:
            names = shown(list(total))
            raise InputError(f"The head plan names layer {shown(layer)}, but its totals have only: {names[1:-1]}.")
        if isinstance(indices, (str, bytes, Mapping)) or not isinstance(indices, Iterable):
            raise InputError(f"The {unit}s kept in layer {layer} must be a list of numbers, but are {shown(indices)}.")
        indices = list(indices)
        for index in indices:
            if not _is_count(index) or index >= total[layer]:
                raise InputError(
                    f"The head plan keeps {unit} {shown(index)} of layer {layer}, but its {unit}s are numbered 0 to "
                    f"{total[layer] - 1}."
                )
        if len(set(indices)) != len(indices):
            raise InputError(f"The head plan names a {unit} of layer {layer} twice: {shown(indices)}.")
        kept[layer] = tuple(sorted(indices))
    return kept


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Layer → indices of the blocks that stay, counted in the original dense model.

    Args:
        size: hidden units, or persistent vectors, of a block.
        kept: the blocks that stay, by layer; a layer that is not named keeps all of its blocks.
        total: how many blocks each layer has in the dense model.

    Raises:
        InputError: a layer or a block is named that the totals don't have, or a block is named twice.
    """

    size: int
    kept: Mapping[Any, Sequence[int]]
    total: Mapping[Any, int]

    def __post_init__(self) -> None:
        if not _is_count(self.size) or self.size == 0:
            raise InputError(f"A head plan's block size must be a number above 0, but it is {shown(self.size)}.")
        total = _checked_total(self.total, "block")
        object.__setattr__(self, "kept", _checked_kept(self.kept, total, "block"))
        object.__setattr__(self, "total", total)

    def __hash__(self) -> int:
        return hash((self.size, tuple(self.kept.items()), tuple(self.total.items())))

    @property
    def blocks(self) -> list[int]:
        """How many blocks stay, one number a layer that has any."""
        return [len(blocks) for blocks in self.kept.values()]

    @property
    def sparsity(self) -> float:
        """Share of the dense model's blocks that go, in [0, 1]."""
        return 1.0 - sum(self.blocks) / sum(self.total.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "size": self.size,
            "total": {str(layer): count for layer, count in self.total.items()},
            "kept": {str(layer): list(blocks) for layer, blocks in self.kept.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> BlockPlan:
        """Read a plan from JSON values.

        Raises:
            InputError: the values are not those of blocks.
        """
        if not isinstance(values, dict) or set(values) != _BLOCK_KEYS:
            raise InputError('A head plan\'s "blocks" must be a JSON object with "size", "total" and "kept".')
        if not isinstance(values["total"], dict) or not isinstance(values["kept"], dict):
            raise InputError('"total" and "kept" of a head plan\'s "blocks" must be JSON objects, one entry a layer.')
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Layer → indices of the heads that stay, counted in the original dense model.

    Args:
        kept: the heads that stay, by layer; a layer that is not named keeps all of its heads.
        total: how many heads each layer has in the dense model.
        unit: what an index names: a query ``head`` or a ``kv_group`` (a key/value head with its query heads).
        output_scale: whether each layer's output is multiplied by heads before / heads kept, as the gates that
            learned the plan did (paper, section on attention output scaling). Plans made by hand leave it off.
        blocks: the blocks that stay; None where a plan has no say in them.

    Raises:
        InputError: a layer or a head is named that the totals don't have, or a head is named twice.
    """

    # Mappings are invariant in their keys: with `Layer` a type checker would refuse a plain dict[int, list[int]].
    kept: Mapping[Any, Sequence[int]]
    total: Mapping[Any, int]
    unit: Unit = "head"
    output_scale: bool = False
    blocks: BlockPlan | None = None

    def __post_init__(self) -> None:
        unit: Any = self.unit
        if not isinstance(unit, str) or unit not in ("head", "kv_group"):
            raise InputError(f"A head plan's unit must be 'head' or 'kv_group', but it is {shown(self.unit)}.")
        if not isinstance(self.output_scale, bool):
            raise InputError(f"A head plan's output_scale must be true or false, but it is {shown(self.output_scale)}.")
        require_type(self.blocks, BlockPlan | None, "A head plan's blocks must be")
        total = _checked_total(self.total, "head")
        object.__setattr__(self, "kept", _checked_kept(self.kept, total, "head"))
        object.__setattr__(self, "total", total)

    def __hash__(self) -> int:
        return hash((tuple(self.kept.items()), tuple(self.total.items()), self.unit, self.output_scale, self.blocks))

    @classmethod
    def keep_all(cls, total: Mapping[Any, int], *, unit: Unit = "head") -> HeadPlan:
        """Return the plan that cuts nothing."""
        return cls(kept={}, total=total, unit=unit)

    @classmethod
    def of_units(
        cls,
        kept: Mapping[UnitKey, Sequence[int]],
        total: Mapping[UnitKey, int],
        *,
        unit: Unit,
        output_scale: bool = False,
        block_size: int | None = None,
    ) -> HeadPlan:
        """Return the plan that keeps some units, heads and blocks alike; where there are blocks it needs their size."""

        def of(kind: str, found: Mapping[UnitKey, Any]) -> dict[Layer, Any]:
            return {key.layer: value for key, value in found.items() if key.kind == kind}

        blocks = None
        if block_size is not None:
            blocks = BlockPlan(size=block_size, kept=of("block", kept), total=of("block", total))
        return cls(kept=of("head", kept), total=of("head", total), unit=unit, output_scale=output_scale, blocks=blocks)

    @property
    def units(self) -> dict[UnitKey, tuple[int, ...]]:
        """The units that stay, heads and blocks, by key."""
        kept = {UnitKey("head", layer): tuple(heads) for layer, heads in self.kept.items()}
        if self.blocks is not None:
            kept |= {UnitKey("block", layer): tuple(blocks) for layer, blocks in self.blocks.kept.items()}
        return kept

    @property
    def heads(self) -> list[int]:
        """How many heads stay, one number a layer."""
        return [len(heads) for heads in self.kept.values()]

    @property
    def sparsity(self) -> float:
        """Share of the dense model's heads that go, in [0, 1]."""
        return 1.0 - sum(self.heads) / sum(self.total.values())

    @typed
    def cut(self, layer: Layer) -> tuple[int, ...]:
        """Return the heads of `layer` that go; an InputError says that there is no such layer."""
        if layer not in self.kept:
            raise InputError(f"The head plan has the layers {shown(list(self.kept))[1:-1]}, but not {shown(layer)}.")
        kept = set(self.kept[layer])
        return tuple(head for head in range(self.total[layer]) if head not in kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "version": 1 if self.blocks is None else 2,
            "unit": self.unit,
            "total": {str(layer): count for layer, count in self.total.items()},
            "kept": {str(layer): list(heads) for layer, heads in self.kept.items()},
            "output_scale": self.output_scale,
            **({} if self.blocks is None else {"blocks": self.blocks.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> HeadPlan:
        """Read a plan from JSON values.

        Raises:
            InputError: the values are not those of a head plan.
        """
        if not isinstance(values, dict) or "total" not in values or "kept" not in values:
            raise InputError('A head plan must be a JSON object with "version", "unit", "total" and "kept".')
        if unknown := sorted(set(values) - _KEYS):
            raise InputError(
                f"The head plan has an unknown key {shown(unknown[0])}; known are {', '.join(sorted(_KEYS))}."
            )
        version = values.get("version", 1)
        if not _is_count(version) or version not in _VERSIONS:
            raise InputError(f"The head plan has version {shown(version)}, but this deadhead reads 1 and 2.")
        if not isinstance(values["total"], dict) or not isinstance(values["kept"], dict):
            raise InputError('A head plan\'s "total" and "kept" must be JSON objects with one entry a layer.')
        blocks = values.get("blocks")
        if blocks is not None and version == 1:
            raise InputError('The head plan has "blocks", which are of version 2, but its version is 1.')
        return cls(
            kept=values["kept"],
            total=values["total"],
            unit=cast(Unit, values.get("unit", "head")),
            output_scale=values.get("output_scale", False),
            blocks=None if blocks is None else BlockPlan.from_dict(blocks),
        )

    @typed
    def to_json(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    @typed
    def from_json(cls, path: str | Path) -> HeadPlan:
        """Read a plan from a file.

        Raises:
            InputError: the file is missing, is not JSON or is not a head plan.
        """
        return cls.from_dict(read_json(Path(path), what="head plan"))

    def __str__(self) -> str:
        return json.dumps(self.to_dict()["kept"])


def choose_block_size(widths: Sequence[int], asked: int | None, recorded: BlockPlan | None) -> int:
    """Return the size of the blocks of layers of these widths, in the dense model: as asked for, or as they were cut.

    Else it is the largest power of two that divides all widths, up to 128 and an eighth of a layer; matrices whose
    sides are multiples of 64 or 128 are the fastest.

    Raises:
        InputError: the size does not divide a width, or is not the one that the model was cut by.
    """
    if recorded is not None:
        if asked not in (None, recorded.size):
            raise InputError(
                f"This model was cut in blocks of {recorded.size}, but a block size of {asked} was asked for; leave it "
                "out."
            )
        return recorded.size
    if asked is None:
        common = math.gcd(*widths)
        power = common & -common
        while power > 1 and (power > _LARGEST_BLOCK or power * _FEWEST_BLOCKS > min(widths)):
            power //= 2
        return power
    if asked < 1 or any(width % asked for width in widths):
        raise InputError(
            f"The block size must divide the width of every layer, {sorted(set(widths))}, but it is {asked}; "
            f"{choose_block_size(widths, None, None)} would do."
        )
    return asked
