"""The head plan: which heads of each layer stay. Learned gates, heuristics and people all express pruning as a plan.

A plan may also say which hidden units of each feed-forward layer stay, or which persistent vectors. Heads and hidden
units are called units; a `UnitKey` names them by kind and layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json, shown
from deadhead.errors import InputError, require_type, typed
from deadhead.plans.unit_plan import Layer, UnitPlan, checked_kept, checked_total, is_count, layer_key

Unit = Literal["head", "kv_group"]

# Version 2 had "blocks", runs of hidden units of one size. Version 3 names hidden units one by one.
_VERSIONS = (1, 2, 3)
_KEYS = {"version", "unit", "total", "kept", "output_scale", "blocks", "hidden_units"}
_BLOCK_KEYS = {"size", "total", "kept"}
_BLOCKS = "blocks."


class UnitKey(NamedTuple):
    """The key of a layer's heads, or of its hidden units, which gates take in blocks; `str` gives the form in files."""

    kind: Literal["head", "block"]
    layer: Layer

    @classmethod
    def parse(cls, text: str) -> UnitKey:
        """Read a key in the form that files have: `3` for heads, `blocks.3` for blocks."""
        return cls("block" if text.startswith(_BLOCKS) else "head", layer_key(text.removeprefix(_BLOCKS)))

    def __str__(self) -> str:
        return f"{_BLOCKS if self.kind == 'block' else ''}{self.layer}"


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Which heads of each layer stay, by their indices in the original dense model.

    Args:
        kept: the heads that stay, by layer. A layer that is not named keeps all of its heads.
        total: the number of heads of each layer in the dense model.
        unit: what an index names: a query "head" or a "kv_group" (a key/value head with its query heads).
        output_scale: whether each layer's output is multiplied by heads before / heads kept, as the gates that
            learned the plan did (paper, section on attention output scaling). Leave it off in plans made by hand.
        hidden_units: the hidden units, or persistent vectors, that stay. None if the plan says nothing of them.

    Raises:
        InputError: the plan names a layer or a head that the totals don't have, or names a head twice.
    """

    # Mappings are invariant in their keys: with `Layer` a type checker would refuse a plain dict[int, list[int]].
    kept: Mapping[Any, Sequence[int]]
    total: Mapping[Any, int]
    unit: Unit = "head"
    output_scale: bool = False
    hidden_units: UnitPlan | None = None

    def __post_init__(self) -> None:
        unit: Any = self.unit
        if not isinstance(unit, str) or unit not in ("head", "kv_group"):
            raise InputError(f"A head plan's unit must be 'head' or 'kv_group', but it is {shown(self.unit)}.")
        if not isinstance(self.output_scale, bool):
            raise InputError(f"A head plan's output_scale must be true or false, but it is {shown(self.output_scale)}.")
        require_type(self.hidden_units, UnitPlan | None, "A head plan's hidden_units must be")
        total = checked_total(self.total, "head")
        object.__setattr__(self, "kept", checked_kept(self.kept, total, "head"))
        object.__setattr__(self, "total", total)

    def __hash__(self) -> int:
        kept, total = tuple(self.kept.items()), tuple(self.total.items())
        return hash((kept, total, self.unit, self.output_scale, self.hidden_units))

    @classmethod
    def keep_all(cls, total: Mapping[Any, int], *, unit: Unit = "head") -> HeadPlan:
        """Return the plan that cuts nothing."""
        return cls(kept={}, total=total, unit=unit)

    @property
    def units(self) -> dict[UnitKey, tuple[int, ...]]:
        """The units that stay, both heads and hidden units, by key."""
        kept = {UnitKey("head", layer): tuple(heads) for layer, heads in self.kept.items()}
        if self.hidden_units is not None:
            kept |= {UnitKey("block", layer): tuple(units) for layer, units in self.hidden_units.kept.items()}
        return kept

    @property
    def heads(self) -> list[int]:
        """The number of heads that stay in each layer."""
        return [len(heads) for heads in self.kept.values()]

    @property
    def sparsity(self) -> float:
        """The share of the dense model's heads that the plan drops, in [0, 1]."""
        return 1.0 - sum(self.heads) / sum(self.total.values())

    @typed
    def cut(self, layer: Layer) -> tuple[int, ...]:
        """Return the heads of `layer` that the plan drops.

        Raises:
            InputError: the plan has no such layer.
        """
        if layer not in self.kept:
            raise InputError(f"The head plan has the layers {shown(list(self.kept))[1:-1]}, but not {shown(layer)}.")
        kept = set(self.kept[layer])
        return tuple(head for head in range(self.total[layer]) if head not in kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "version": 1 if self.hidden_units is None else 3,
            "unit": self.unit,
            "total": {str(layer): count for layer, count in self.total.items()},
            "kept": {str(layer): list(heads) for layer, heads in self.kept.items()},
            "output_scale": self.output_scale,
            **({} if self.hidden_units is None else {"hidden_units": self.hidden_units.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> HeadPlan:
        """Read a plan from JSON values.

        Raises:
            InputError: the values are not a head plan.
        """
        if not isinstance(values, dict) or "total" not in values or "kept" not in values:
            raise InputError('A head plan must be a JSON object with "version", "unit", "total" and "kept".')
        if unknown := sorted(set(values) - _KEYS):
            raise InputError(
                f"The head plan has an unknown key {shown(unknown[0])}; known are {', '.join(sorted(_KEYS))}."
            )
        version = values.get("version", 1)
        if not is_count(version) or version not in _VERSIONS:
            raise InputError(f"The head plan has version {shown(version)}, but this deadhead reads 1, 2 and 3.")
        if not isinstance(values["total"], dict) or not isinstance(values["kept"], dict):
            raise InputError('A head plan\'s "total" and "kept" must be JSON objects with one entry a layer.')
        for name, of in {"blocks": 2, "hidden_units": 3}.items():
            if values.get(name) is not None and version != of:
                raise InputError(
                    f'The head plan has "{name}", which belong to version {of}, but its version is {version}.'
                )
        return cls(
            kept=values["kept"],
            total=values["total"],
            unit=cast(Unit, values.get("unit", "head")),
            output_scale=values.get("output_scale", False),
            hidden_units=_read_units(values),
        )

    @typed
    def to_json(self, path: str | Path) -> None:
        """Write the plan to a JSON file, completely or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    @typed
    def from_json(cls, path: str | Path) -> HeadPlan:
        """Read a plan from a JSON file.

        Raises:
            InputError: the file is missing, is not JSON or is not a head plan.
        """
        return cls.from_dict(read_json(Path(path), what="head plan"))

    def __str__(self) -> str:
        return json.dumps(self.to_dict()["kept"])


def _read_units(values: Mapping[str, Any]) -> UnitPlan | None:
    """Return the hidden units that a plan's JSON keeps, from version 3's units or version 2's blocks."""
    if values.get("hidden_units") is not None:
        return UnitPlan.from_dict(values["hidden_units"])
    if (blocks := values.get("blocks")) is None:
        return None
    if not isinstance(blocks, dict) or set(blocks) != _BLOCK_KEYS:
        raise InputError('A head plan\'s "blocks" must be a JSON object with "size", "total" and "kept".')
    if not isinstance(blocks["total"], dict) or not isinstance(blocks["kept"], dict):
        raise InputError('"total" and "kept" of a head plan\'s "blocks" must be JSON objects, one entry a layer.')
    return UnitPlan.of_blocks(**blocks)
