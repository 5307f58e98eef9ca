"""What gates open, and rankings choose from: single heads, and blocks of hidden units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deadhead.errors import InputError
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_plan import Layer, UnitPlan, ranges_text


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The units that each choice stands for, by key, numbered as in the dense model: a head, or a block's units."""

    unit: Unit  # what a head's index names
    members: Mapping[UnitKey, Sequence[Sequence[int]]]  # () where no unit is left
    total: Mapping[UnitKey, int]  # units of the dense model; layers that have lost all of them are in it too
    # Hidden units that went with the last head of their layer; what a plan says of them has no effect.
    headless: frozenset[UnitKey] = frozenset()

    @cached_property
    def counts(self) -> dict[UnitKey, int]:
        """The number of choices, by key."""
        return {key: len(members) for key, members in self.members.items()}

    @cached_property
    def sizes(self) -> dict[UnitKey, Tensor]:
        """The number of units of each choice, (H,) by key, float64."""
        return {
            key: torch.tensor([len(block) for block in blocks], dtype=torch.float64)
            for key, blocks in self.members.items()
        }

    @cached_property
    def units(self) -> dict[UnitKey, tuple[int, ...]]:
        """All units, ascending, by key."""
        return {key: _united(members) for key, members in self.members.items()}

    @property
    def has_blocks(self) -> bool:
        """Whether there are hidden units among the choices."""
        return bool(self.hidden)

    @property
    def hidden(self) -> dict[UnitKey, Sequence[Sequence[int]]]:
        """The units of each block, by key."""
        return {key: blocks for key, blocks in self.members.items() if key.kind == "block"}

    @property
    def blocks(self) -> dict[Layer, list[str]]:
        """The units of each block, by layer, as ranges."""
        return {key.layer: [ranges_text(block) for block in blocks] for key, blocks in self.hidden.items()}

    def plan(self, kept: Mapping[UnitKey, Iterable[int]], *, output_scale: bool = False) -> HeadPlan:
        """Return the plan that keeps some choices, given their places by key; a key that is not named keeps all."""
        units = {key: _united(self.members[key][place] for place in places) for key, places in kept.items()}
        return self.plan_of(units, output_scale=output_scale)

    def plan_of(self, units: Mapping[UnitKey, Sequence[int]], *, output_scale: bool = False) -> HeadPlan:
        """Return the plan that keeps some units, given by key; a key that is not named keeps all."""
        units = {**self.units, **units}

        def of(kind: str, found: Mapping[UnitKey, int] | Mapping[UnitKey, Sequence[int]]) -> dict[Layer, object]:
            return {key.layer: value for key, value in found.items() if key.kind == kind}

        hidden: dict[str, dict[Layer, object]] = {"kept": of("block", units), "total": of("block", self.total)}
        return HeadPlan(
            kept=of("head", units),  # type: ignore[arg-type]
            total=of("head", self.total),  # type: ignore[arg-type]
            unit=self.unit,
            output_scale=output_scale,
            hidden_units=UnitPlan(**hidden) if self.has_blocks else None,  # type: ignore[arg-type]
        )

    def kept_units(self, plan: HeadPlan) -> dict[UnitKey, tuple[int, ...]]:
        """Return the units that `plan` keeps, by key, with all hidden units if it says nothing of them.

        Raises:
            InputError: its unit, layers or numbers are not this model's, or it keeps a unit that was cut before.
        """
        if plan.unit != self.unit:
            raise InputError(
                f"The head plan counts in {plan.unit}s, but this model's gates open and close {self.unit}s."
            )
        self._require_total(plan.total, "head")
        if plan.hidden_units is not None:
            if not self.has_blocks:
                raise InputError(
                    "The head plan also names hidden units, but this model's gates are on heads alone; attach them "
                    "with deadhead.attach(model, blocks=True)."
                )
            self._require_total(plan.hidden_units.total, "hidden unit")
        named = plan.units
        kept = {key: () if key in self.headless else named.get(key, units) for key, units in self.units.items()}
        for key, units in self.units.items():
            if gone := sorted(set(kept[key]) - set(units)):
                what = "hidden unit" if key.kind == "block" else "head"
                raise InputError(
                    f"The head plan keeps {what} {gone[0]} of layer {key.layer}, but that {what} was cut before."
                )
        return kept

    def _require_total(self, total: Mapping[Layer, int], what: str) -> None:
        there = {key.layer: count for key, count in self.total.items() if (key.kind == "head") == (what == "head")}
        if dict(total) != there:
            raise InputError(
                f"The head plan is for {[*total.values()]} {what}s a layer, but this model had {[*there.values()]}."
            )

    def kept(self, plan: HeadPlan) -> dict[UnitKey, Tensor]:
        """Return which choices `plan` keeps, (H,) by key, bool.

        Raises:
            InputError: see `kept_units`, or the plan keeps only a part of a block.
        """
        found = self._shares(plan)
        if (parted := _parted(found)) is not None:
            raise InputError(
                f"The head plan keeps some hidden units of a block of layer {parted.layer} and not the others, so "
                "that no gate can represent it; attach gates with the blocks that the plan was made from."
            )
        return {key: share_H == 1 for key, share_H in found.items()}

    def fits(self, plan: HeadPlan) -> bool:
        """Return whether a plan of this model keeps or drops every block as a whole."""
        return _parted(self._shares(plan)) is None

    def _shares(self, plan: HeadPlan) -> dict[UnitKey, Tensor]:
        """Return the share of its units that each choice keeps, (H,) by key."""
        kept = {key: set(units) for key, units in self.kept_units(plan).items()}
        return {
            key: torch.tensor([sum(unit in kept[key] for unit in block) / len(block) for block in blocks])
            for key, blocks in self.members.items()
        }


def _parted(shares: Mapping[UnitKey, Tensor]) -> UnitKey | None:
    """Return the first key with a choice that is kept only in part, if there is one."""
    return next((key for key, share_H in shares.items() if bool(((share_H > 0) & (share_H < 1)).any())), None)


def _united(members: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(unit for block in members for unit in block))
