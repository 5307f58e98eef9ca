"""Scores of heads, and the head plan that drops those with the lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deadhead.errors import InputError
from deadhead.plans.kinds import Ranking
from deadhead.plans.plan import HeadPlan, Layer, Unit, is_block_key
from deadhead.plans.unit_costs import UnitCosts


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """How much each head of a model is worth, by whatever criterion; the lowest go first.

    Args:
        scores: by layer, a number for each head there is now, (H,), on the CPU. −∞: this head must go.
        heads: by layer, the index in the original dense model of each head there is now; () for an emptied layer.
        total: heads of each layer of the original dense model.
        unit: what an index names.
        output_scale: what the plan is to say of it; False for scores that were taken without gates.
        block_size: size of the blocks that have scores too, under keys of their own, or None.
    """

    scores: Mapping[Any, Tensor]
    heads: Mapping[Any, tuple[int, ...]]
    total: Mapping[Any, int]
    unit: Unit
    output_scale: bool = False
    block_size: int | None = None

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
        if ranking not in ("global", "layer"):
            raise InputError(f"ranking must be 'global' or 'layer', but it is {ranking!r}.")
        self._require_numbers()
        layers: list[Layer] = [layer for layer, heads in self.heads.items() if heads]
        kinds = [[layer for layer in layers if is_block_key(layer) == is_block] for is_block in (False, True)]
        groups = kinds if ranking == "global" else [[layer] for layer in layers]
        kept: dict[Any, tuple[int, ...]] = dict.fromkeys(self.heads, ())
        for group in groups:
            values = torch.cat([self.scores[layer].flatten() for layer in group]) if group else torch.empty(0)
            stays = values > -math.inf
            stays[values.argsort(stable=True)[: round(sparsity * len(values))]] = False
            parts = stays.split([len(self.heads[layer]) for layer in group]) if group else ()
            for layer, part in zip(group, parts, strict=True):
                kept[layer] = tuple(head for head, stay in zip(self.heads[layer], part.tolist(), strict=True) if stay)
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

        What then still fits comes back, the highest scores first, so that the budget is used up.

        Args:
            costs: what units cost, at least for those that have scores.
            limit: the cost that may be left; where no plan comes so low, all units go that cost anything.

        Raises:
            InputError: a score is not a number.
        """
        self._require_numbers()
        kept = {key: set(range(len(heads))) for key, heads in self.heads.items()}
        counts = {key: len(heads) for key, heads in self.heads.items()}
        spent = costs.of(counts)
        gone: list[tuple[float, Layer, int]] = []
        for score, key, place in self._ascending(costs):
            if spent <= limit and score > -math.inf:
                break
            if score > -math.inf and costs.saved(key, counts[key]) <= 0:
                continue
            spent -= costs.saved(key, counts[key])
            kept[key].discard(place)
            counts[key] -= 1
            gone.append((score, key, place))
        for score, key, place in reversed(gone):
            price = costs.saved(key, counts[key] + 1)
            if score > -math.inf and spent + price <= limit:
                spent += price
                counts[key] += 1
                kept[key].add(place)
        return self._plan_of(
            {key: tuple(heads[place] for place in sorted(kept[key])) for key, heads in self.heads.items()}
        )

    def _ascending(self, costs: UnitCosts) -> list[tuple[float, Layer, int]]:
        """Return score, key and place of all units that have a cost, the lowest scores first."""
        keys = [key for key in costs.tables if self.heads[key]]
        scores = torch.cat([self.scores[key].flatten() for key in keys]) if keys else torch.empty(0)
        units = [(key, place) for key in keys for place in range(len(self.heads[key]))]
        return [(float(scores[index]), *units[index]) for index in scores.argsort(stable=True).tolist()]

    def _plan_of(self, kept: Mapping[Any, tuple[int, ...]]) -> HeadPlan:
        return HeadPlan.of_units(
            kept, self.total, unit=self.unit, output_scale=self.output_scale, block_size=self.block_size
        )

    def _require_numbers(self) -> None:
        if any(bool(values.isnan().any()) for values in self.scores.values()):
            raise InputError("Some heads have a score that is not a number, so they cannot be ranked.")
