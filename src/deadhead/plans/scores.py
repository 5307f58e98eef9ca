"""Scores of heads, and the head plan that drops those with the lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from deadhead.errors import InputError, typed
from deadhead.plans.kinds import Ranking
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_costs import UnitCosts


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """How much each head of a model is worth, by whatever criterion; the lowest go first."""

    scores: Mapping[UnitKey, Tensor]  # a number for each unit there is now, (H,), on the CPU. −∞: it must go
    heads: Mapping[UnitKey, tuple[int, ...]]  # index in the dense model of each unit there is now; () where none is
    total: Mapping[UnitKey, int]  # units of the dense model
    unit: Unit  # what a head's index names
    output_scale: bool = False  # what the plan is to say of it; False for scores that were taken without gates
    block_size: int | None = None  # size of the blocks that have scores too, or None

    @typed
    def plan(self, sparsity: float, *, ranking: Ranking = "global") -> HeadPlan:
        """Return the plan that drops a share of the heads there are now, those with the lowest scores.

        The same share goes of the blocks, if they have scores.

        Args:
            sparsity: the share, in [0, 1]; heads that must go are among them, even if they are more.
            ranking: "global" compares the heads of all layers; "layer" drops the same share of each.

        Raises:
            InputError: the sparsity is out of range, or a score is not a number.
        """
        if not 0 <= sparsity <= 1:
            raise InputError(f"The sparsity must lie between 0 and 1, but it is {sparsity}.")
        self._require_numbers()
        keys = [key for key, heads in self.heads.items() if heads]
        kinds = [[key for key in keys if key.kind == kind] for kind in ("head", "block")]
        groups = kinds if ranking == "global" else [[key] for key in keys]
        kept: dict[UnitKey, tuple[int, ...]] = dict.fromkeys(self.heads, ())
        for group in filter(None, groups):
            values = torch.cat([self.scores[key].flatten() for key in group])
            stays = values > -math.inf
            stays[values.argsort(stable=True)[: round(sparsity * len(values))]] = False
            for key, part in zip(group, stays.split([len(self.heads[key]) for key in group]), strict=True):
                kept[key] = tuple(compress(self.heads[key], part.tolist()))
        return self._plan_of(kept)

    def over(self, costs: UnitCosts) -> HeadScores:
        """Return these scores, which are worth something as numbers, over what each unit costs."""
        slopes = costs.slopes({key: len(heads) for key, heads in self.heads.items()})
        mean = sum(slopes.values()) / max(len(slopes), 1)
        scores = {
            # What costs nothing is worth keeping whatever its score.
            key: values / (slopes[key] / mean) if slopes.get(key, 0.0) > 0 else values
            for key, values in self.scores.items()
        }
        return replace(self, scores=scores)

    def within(self, costs: UnitCosts, limit: float) -> HeadPlan:
        """Return the plan that drops the units with the lowest scores until what stays costs no more than a limit.

        What then still fits comes back, the highest scores first, so that the budget is used up. Where no plan comes so
        low, all units go that cost anything. A score that is not a number is an InputError.
        """
        self._require_numbers()
        kept = {key: set(heads) for key, heads in self.heads.items()}
        spent = costs.of({key: len(heads) for key, heads in kept.items()})
        gone: list[tuple[float, UnitKey, int]] = []
        keys = [key for key in costs.tables if self.heads[key]]
        scores = torch.cat([self.scores[key].flatten() for key in keys]) if keys else torch.empty(0)
        units = [(key, head) for key in keys for head in self.heads[key]]
        for index in scores.argsort(stable=True).tolist():
            score, (key, head) = float(scores[index]), units[index]
            if spent <= limit and score > -math.inf:
                break
            if score > -math.inf and costs.saved(key, len(kept[key])) <= 0:
                continue
            spent -= costs.saved(key, len(kept[key]))
            kept[key].discard(head)
            gone.append((score, key, head))
        for score, key, head in reversed(gone):
            price = costs.saved(key, len(kept[key]) + 1)
            if score > -math.inf and spent + price <= limit:
                spent += price
                kept[key].add(head)
        return self._plan_of({key: tuple(heads) for key, heads in kept.items()})

    def _plan_of(self, kept: Mapping[UnitKey, tuple[int, ...]]) -> HeadPlan:
        return HeadPlan.of_units(
            kept, self.total, unit=self.unit, output_scale=self.output_scale, block_size=self.block_size
        )

    def _require_numbers(self) -> None:
        if any(bool(values.isnan().any()) for values in self.scores.values()):
            raise InputError("Some heads have a score that is not a number, so they cannot be ranked.")
