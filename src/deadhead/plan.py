"""The head plan: which heads of each layer stay. The one noun that learned gates, heuristics and people share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from deadhead.errors import InputError
from deadhead.files import read_json, write_json

Layer = int | str
"""A layer's index, or its module path where a model has more than one stack of layers."""

Unit = Literal["head", "kv_group"]

_VERSION = 1
# Version 2 adds "blocks", which name parts of feed-forward layers.
_KEYS = {"version", "unit", "total", "kept", "output_scale", "blocks"}
_MOST_HEADS = 100_000


def layer_key(key: Layer) -> Layer:
    """Return a layer's key as it is in memory: JSON writes indices as strings."""
    return int(key) if isinstance(key, str) and re.fullmatch("[0-9]+", key) else key


def _by_layer(values: Mapping[Layer, Any], what: str) -> dict[Layer, Any]:
    found: dict[Layer, Any] = {}
    for key, value in values.items():
        layer = layer_key(key)
        if layer in found:
            raise InputError(f"A head plan's {what} name layer {layer} twice.")
        found[layer] = value
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Layer → indices of the heads that stay, counted in the original dense model.

    Args:
        kept: the heads that stay, by layer; a layer that is not named keeps all of its heads.
        total: how many heads each layer has in the dense model.
        unit: what an index names: a query ``head`` or a ``kv_group`` (a key/value head with its query heads).
        output_scale: whether each layer's output is multiplied by heads before / heads kept, as the gates that
            learned the plan did (paper, section on attention output scaling). Plans made by hand leave it off.

    Raises:
        InputError: a layer or a head is named that the totals don't have, or a head is named twice.
    """

    # Mappings are invariant in their keys: with `Layer` a type checker would refuse a plain dict[int, list[int]].
    kept: Mapping[Any, Sequence[int]]
    total: Mapping[Any, int]
    unit: Unit = "head"
    output_scale: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.unit not in ("head", "kv_group"):
            raise InputError(f"A head plan's unit must be 'head' or 'kv_group', but it is {self.unit!r}.")
        if not isinstance(self.output_scale, bool):
            raise InputError(f"A head plan's output_scale must be true or false, but it is {self.output_scale!r}.")
        total = _by_layer(self.total, "totals")
        if not total:
            raise InputError("A head plan's totals must name at least one layer, but they are empty.")
        for layer, count in total.items():
            if not _is_count(count) or count == 0:
                raise InputError(f"A head plan must give layer {layer} at least one head in all, but gives {count!r}.")
            if count > _MOST_HEADS:
                raise InputError(f"A head plan gives layer {layer} {count} heads, but no model has over {_MOST_HEADS}.")
        kept: dict[Layer, tuple[int, ...]] = {layer: tuple(range(count)) for layer, count in total.items()}
        for layer, heads in _by_layer(self.kept, "kept heads").items():
            if layer not in total:
                names = ", ".join(str(name) for name in total)
                raise InputError(f"The head plan names layer {layer}, but its totals have only: {names}.")
            kept[layer] = self._checked(layer, heads, total[layer])
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "kept", kept)

    @staticmethod
    def _checked(layer: Layer, heads: Iterable[int], count: int) -> tuple[int, ...]:
        if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
            raise InputError(f"The heads kept in layer {layer} must be a list of numbers, but are {heads!r}.")
        indices = list(heads)
        for head in indices:
            if not _is_count(head) or head >= count:
                raise InputError(
                    f"The head plan keeps head {head!r} of layer {layer}, but its heads are numbered 0 to {count - 1}."
                )
        if len(set(indices)) != len(indices):
            raise InputError(f"The head plan names a head of layer {layer} twice: {indices}.")
        return tuple(sorted(indices))

    def __hash__(self) -> int:
        return hash((tuple(self.kept.items()), tuple(self.total.items()), self.unit, self.output_scale))

    @classmethod
    def keep_all(cls, total: Mapping[Any, int], *, unit: Unit = "head") -> HeadPlan:
        """Return the plan that cuts nothing."""
        return cls(kept={}, total=total, unit=unit)

    @property
    def heads(self) -> list[int]:
        """How many heads stay, one number a layer."""
        return [len(heads) for heads in self.kept.values()]

    @property
    def sparsity(self) -> float:
        """Share of the dense model's heads that go, in [0, 1]."""
        return 1.0 - sum(self.heads) / sum(self.total.values())

    def cut(self, layer: Layer) -> tuple[int, ...]:
        """Return the heads of `layer` that go."""
        kept = set(self.kept[layer])
        return tuple(head for head in range(self.total[layer]) if head not in kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "version": _VERSION,
            "unit": self.unit,
            "total": {str(layer): count for layer, count in self.total.items()},
            "kept": {str(layer): list(heads) for layer, heads in self.kept.items()},
            "output_scale": self.output_scale,
        }

    @classmethod
    def from_dict(cls, values: Any) -> HeadPlan:
        """Read a plan from JSON values.

        Raises:
            InputError: the values are not those of a head plan.
        """
        if not isinstance(values, dict) or "total" not in values or "kept" not in values:
            raise InputError('A head plan must be a JSON object with "version", "unit", "total" and "kept".')
        unknown = sorted(set(values) - _KEYS)
        if unknown:
            raise InputError(f"The head plan has an unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}.")
        version = values.get("version", _VERSION)
        if isinstance(version, bool) or version not in (_VERSION, 2):
            raise InputError(f"The head plan has version {version!r}, but this deadhead reads 1 and 2.")
        if values.get("blocks"):
            raise InputError("The head plan also names feed-forward blocks to cut, which this deadhead cannot do yet.")
        if not isinstance(values["total"], dict) or not isinstance(values["kept"], dict):
            raise InputError('A head plan\'s "total" and "kept" must be JSON objects with one entry a layer.')
        return cls(
            kept=values["kept"],
            total=values["total"],
            unit=cast(Unit, values.get("unit", "head")),
            output_scale=values.get("output_scale", False),
        )

    def to_json(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> HeadPlan:
        """Read a plan from a file.

        Raises:
            InputError: the file is missing, is not JSON or is not a head plan.
        """
        return cls.from_dict(read_json(Path(path), what="head plan"))

    def __str__(self) -> str:
        return json.dumps(self.to_dict()["kept"])
